"""Folders of others that are damaged, or made to harm: each is a sentence, runs nothing, writes
nothing."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import CONFIGS, run_of, tensors_of, write_folder
from test_security import nothing_runs

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
NORM = "model.norm.weight"


# ---- how a folder is changed ---------------------------------------------------------------------
def config(**changes):
    """config.json with other values; one that is `...` is taken out."""

    def change(folder):
        found = json.loads((folder / "config.json").read_text()) | changes
        found = {key: value for key, value in found.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(found))

    return change


def text(name: str, raw):
    """A file with another content."""
    raw = raw.encode() if isinstance(raw, str) else raw
    return lambda folder: (folder / name).write_bytes(raw)


def cut(name: str, n_bytes: int):
    def change(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:n_bytes])

    return change


def index(change_map):
    """The index with another map of tensors to files."""

    def change(folder):
        found = json.loads((folder / INDEX).read_text())
        found["weight_map"] = change_map(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return change


def leads_to(file):
    """An index that says so of one tensor."""
    return index(lambda places: places | {NORM: file})


def tensors(change_all):
    """The file of model.norm with other tensors."""

    def change(folder):
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]
        save_file(change_all(load_file(path)), path)

    return change


def header(change_header, data=None):
    """The file of model.norm with another header, whose bytes are right."""

    def change(folder):
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]
        raw = path.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        found = change_header(json.loads(raw[8 : 8 + n]))
        found = found if isinstance(found, bytes) else json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(found)) + found + (data or raw[8 + n :]))

    return change


def of_norm(**changes):
    return header(lambda found: found | {NORM: found[NORM] | changes})


def twice(found: dict) -> bytes:
    """A header that has a tensor twice."""
    entry = json.dumps({NORM: found[NORM]})[1:-1]
    return (json.dumps(found)[:-1] + f", {entry}}}").encode()


def no_file(folder):
    (folder / FIRST).unlink()


def a_folder(folder):
    no_file(folder)
    (folder / FIRST).mkdir()


def a_pipe(folder):
    no_file(folder)
    os.mkfifo(folder / FIRST)


def stray(folder):
    """A copy of the folder's file beside it, for an index that leads there."""
    (folder.parent / "secret.safetensors").write_bytes((folder / FIRST).read_bytes())
    leads_to("../secret.safetensors")(folder)


def no_index(folder):
    (folder / INDEX).unlink()


ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
# What is changed -> (how, a part of the sentence).
DAMAGE = {
    # config.json
    "config is no json": (text("config.json", "{"), "config.json is damaged"),
    "config is a list": (text("config.json", "[1]"), "no table"),
    "config is empty": (text("config.json", ""), "config.json is damaged"),
    "config is binary": (text("config.json", b"\x80\x04\x95\xff"), "config.json is damaged"),
    "config is deep": (text("config.json", "[" * 10**5), "config.json is damaged"),
    "config has a key twice": (
        text("config.json", '{"model_type": "gpt2", "model_type": "llama"}'),
        "a key is there twice",
    ),
    "config has NaN": (text("config.json", '{"rms_norm_eps": NaN}'), "NaN is no number"),
    "unknown model_type": (config(model_type="gemma9"), "model_type='gemma9'"),
    "model_type is a number": (config(model_type=3), "model_type=3"),
    "no model_type": (config(model_type=...), "model_type=None"),
    "model_type is code": (config(model_type="__import__('os')"), "which is not read"),
    "no width": (config(hidden_size=...), "has no hidden_size"),
    "width is text": (config(hidden_size="32"), "hidden_size='32', which is not a whole number"),
    "width is a float": (config(hidden_size=32.0), "hidden_size=32.0"),
    "width is true": (config(hidden_size=True), "hidden_size=True"),
    "width is negative": (config(hidden_size=-32), "hidden_size=-32"),
    "width is huge": (config(hidden_size=2**40), "hidden_size=1099511627776"),
    "width is a list": (config(hidden_size=[32]), r"hidden_size=\[32\]"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0"),
    "too many layers": (config(num_hidden_layers=3), "has no tensor model.layers.2"),
    "too few layers": (config(num_hidden_layers=1), "this model lacks"),
    "heads do not divide": (config(num_attention_heads=3), "does not fit|divisible"),
    "odd heads": (config(head_dim=7), "head size divisible by 2"),
    "heads of keys do not divide": (config(num_key_value_heads=3), "n_kv_head=3"),
    "another vocabulary": (config(vocab_size=299), "does not fit: model.embed_tokens.weight"),
    "eps is 0": (config(rms_norm_eps=0), "rms_norm_eps=0"),
    "eps is text": (config(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5'"),
    "eps is 5": (config(rms_norm_eps=5.0), "norm_eps=5"),
    "another activation": (config(hidden_act="relu"), "hidden_act='relu'"),
    "tied is text": (config(tie_word_embeddings="no"), "tie_word_embeddings='no'"),
    "tied and another head": (config(tie_word_embeddings=True), "differs from"),
    "biases of attention alone": (config(attention_bias=True), "must agree"),
    "biases that are missing": (config(attention_bias=True, mlp_bias=True), "has no tensor"),
    "rope is yarn": (config(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope_type='yarn'"),
    "rope is dynamic": (config(rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic'"),
    "rope lacks a number": (config(rope_scaling=ROPE), "original_max_position_embeddings"),
    "rope is a list": (config(rope_scaling=[8]), r"rope_scaling=\[8\]"),
    "rope has another key": (
        config(rope_scaling=dict(rope_type="linear", factor=2.0, beta_fast=32)),
        "beta_fast",
    ),
    "rope shrinks": (config(rope_scaling=dict(rope_type="linear", factor=0.5)), "at least 1"),
    "rope in part": (config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "rope twice": (
        config(rope_scaling=ROPE, rope_parameters=dict(rope_type="default")),
        "another rope_scaling",
    ),
    "layers that differ": (
        config(
            model_type="qwen2",
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=8,
            use_sliding_window=True,
        ),
        "layer_types",
    ),
    "dropout is 2": (config(attention_dropout=2), "attention_dropout=2"),
    "quantized": (config(quantization_config=dict(bits=4)), "quantization_config"),
    "an unknown switch": (config(attn_logit_softcapping=30.0), "attn_logit_softcapping"),
    "cross attention": (config(add_cross_attention=True), "add_cross_attention"),
    # the index
    "index is no json": (text(INDEX, "{"), "index.json is damaged"),
    "index has no map": (text(INDEX, "{}"), "no weight_map"),
    "index is empty": (index(lambda places: {}), "no weight_map"),
    "index has a list": (index(list), "no weight_map"),
    "a file above": (stray, "no file's name"),
    "a file at the root": (leads_to("/etc/passwd"), "no file's name"),
    "a file below": (leads_to("sub/model.safetensors"), "no file's name"),
    "a file behind a backslash": (leads_to("..\\x.safetensors"), "no file's name"),
    "a drive": (leads_to("C:x.safetensors"), "no file's name"),
    "a file with a line break": (leads_to("a\n.safetensors"), "no file's name"),
    "a file with no name": (leads_to(""), "no .safetensors"),
    "a file that is a number": (leads_to(3), "no file's name"),
    "a pickle": (leads_to("model.pkl"), "no .safetensors"),
    "a file that is missing": (leads_to("b.safetensors"), "b.safetensors is not there"),
    "index lacks a tensor": (
        index(lambda places: {k: v for k, v in places.items() if k != NORM}),
        "does not",
    ),
    "index has a tensor too many": (index(lambda places: places | {"x": FIRST}), "no tensor 'x'"),
    "no index": (no_index, "no model.safetensors and no model.safetensors.index.json"),
    # the files
    "a missing file": (no_file, "is not there"),
    "a folder for a file": (a_folder, "cannot be read"),
    "a pipe for a file": (a_pipe, "it is no file"),
    "a file cut in its header": (cut(FIRST, 60), "cannot be read"),
    "a file cut in its numbers": (cut(FIRST, -4), "cannot be read"),
    "a file of 5 bytes": (cut(FIRST, 5), "cannot be read"),
    "an empty file": (cut(FIRST, 0), "cannot be read"),
    "a file of a pickle": (text(FIRST, b"\x80\x04\x95" + bytes(99)), "cannot be read"),
    "a huge header": (text(FIRST, struct.pack("<Q", 2**62) + bytes(99)), "cannot be read"),
    "another shape": (
        tensors(lambda held: held | {NORM: torch.ones(31)}),
        r"model.norm.weight, our final_norm.weight, is \(31,\), not \(32,\)",
    ),
    "another rank": (tensors(lambda held: held | {NORM: torch.ones(1, 32)}), "does not fit"),
    "no dimension": (tensors(lambda held: held | {NORM: torch.ones(())}), "does not fit"),
    "integers": (
        tensors(lambda held: held | {NORM: torch.ones(32, dtype=torch.int32)}),
        "model.norm.weight is I32",
    ),
    "fp8": (
        tensors(lambda held: held | {NORM: torch.ones(32).to(torch.float8_e4m3fn)}),
        "model.norm.weight is F8_E4M3",
    ),
    "a tensor too many": (tensors(lambda held: held | {"extra": torch.ones(2)}), "'extra'"),
    "overlapping numbers": (of_norm(data_offsets=[0, 128]), "cannot be read"),
    "numbers beyond the end": (of_norm(data_offsets=[10**9, 10**9 + 128]), "cannot be read"),
    "negative offsets": (of_norm(data_offsets=[-128, 0]), "cannot be read"),
    "offsets that are text": (of_norm(data_offsets=["0", "128"]), "cannot be read"),
    "a shape of NaN": (of_norm(shape=[float("nan")]), "cannot be read"),
    "a shape that is negative": (of_norm(shape=[-32]), "cannot be read"),
    "a shape that is huge": (of_norm(shape=[2**62, 2**62]), "cannot be read"),
    "an unknown dtype": (of_norm(dtype="F33"), "cannot be read"),
    "a tensor twice": (header(twice), "cannot be read"),
    "a header that is a list": (header(lambda found: b"[1, 2]  "), "cannot be read"),
    "a header that is no JSON": (header(lambda found: b"{'a': 1}"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_a_sentence(tmp_path, damage):
    change, says = DAMAGE[damage]
    folder = tmp_path / "in"
    write_folder(folder, CONFIGS["llama"], tensors_of(CONFIGS["llama"], torch.float32), 2)
    change(folder)
    before = listing(tmp_path)
    with nothing_runs(), pytest.raises(ValueError, match=says) as error:
        run_of(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    written = listing(tmp_path) - before
    assert written <= {"text.txt", "out", "out/.lock"}, written


def test_the_folder_is_whole_before_it_is_damaged(tmp_path):
    config = CONFIGS["llama"]
    write_folder(tmp_path / "in", config, tensors_of(config, torch.float32), 2)
    run_of(tmp_path / "in", tmp_path / "out")
    assert len(DAMAGE) >= 60


def test_a_third_of_a_tensor_that_is_no_third_is_a_sentence(tmp_path):
    config = CONFIGS["gpt2"]
    held = tensors_of(config, torch.float32)
    held["transformer.h.0.attn.c_attn.weight"] = torch.zeros(32, 95)
    write_folder(tmp_path / "in", config, held)
    with pytest.raises(ValueError, match="no q, k and v together"):
        run_of(tmp_path / "in", tmp_path / "out")


def listing(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
