"""Runs that begin at weights of others: their settings, layouts, memory; nanoGPT; exports."""

import json
import shutil

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file
from test_families import CONFIGS, bits, config_of, ours_of, run_of, tensors_of, write_folder
from test_security import Payload, nothing_runs

import sample
from checkpoint import __main__ as tool
from checkpoint import export, families, pretrained, tensor_file
from checkpoint.load import resolve
from memory.meter import Meter, nbytes
from model import GPT
from parallel import tensor
from parallel.mesh import make_mesh
from parallel.shard import Shard, sharded
from run import build
from run import pretrained as start
from settings import parse
from settings.fields import with_traits


def folder_of(tmp_path, name: str, n_files: int = 2):
    folder = tmp_path / name
    write_folder(folder, CONFIGS[name], tensors_of(CONFIGS[name], torch.float32), n_files)
    return folder


# ---- settings ------------------------------------------------------------------------------------
def test_what_the_command_leaves_open_comes_from_the_folder(tmp_path):
    cfg = config_of(folder_of(tmp_path, "llama3"))
    assert (cfg.arch, cfg.n_layer, cfg.n_kv_head, cfg.mlp_width, cfg.tied) == (
        "llama",
        2,
        2,
        80,
        True,
    )
    assert cfg.rope_scaling == "llama3:8:1:4:16" and cfg.rope_base == 500000
    assert (cfg.block_size, cfg.vocab_size) == (256, 300)
    cfg = config_of(folder_of(tmp_path, "gpt2"), "--activation=gelu_tanh", "--n_head=4")
    assert (cfg.block_size, cfg.position, cfg.activation) == (64, "learned", "gelu_tanh")
    # What layers/rope_scaling.py reads alike is alike, and none is no value.
    words = ["--rope_scaling=llama3:8.0:1.0:4.0:16", "--n_kv_head=none", "--qk_norm=auto"]
    assert config_of(tmp_path / "llama3", *words).n_kv_head == 2
    # A window is a window where a sequence fills it.
    folder_of(tmp_path, "mistral")
    assert config_of(tmp_path / "mistral").window == 8
    assert config_of(tmp_path / "mistral", "--block_size=8").window is None


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--n_layer=3", "n_layer=2 and the command --n_layer=3"),
        ("--arch=modern", "arch=llama and the command --arch=modern"),
        ("--rope_base=10000", "--rope_base=500000"),
        ("--rope_scaling=none", "--rope_scaling=llama3:8:1:4:16"),
        ("--activation=relu2", "--activation=swiglu"),
        ("--tied=false", "--tied=true"),
        ("--logit_cap=15", "--logit_cap=none"),
        ("--bias=true", "--bias=false"),
        ("--head_dim=16", "--head_dim=8"),
        ("--vocab_size=256", "--vocab_size=300, or more"),
        ("--mup_base_width=16", "--mup_base_width=none"),
        ("--ngram_embed=3", "--ngram_embed=none"),
        ("--window=8", "--window=none"),
        ("--tp=3", "tp=3 does not divide"),
    ],
)
def test_a_flag_that_disagrees_stops_the_run(tmp_path, flag, says):
    with pytest.raises(ValueError, match=says):
        config_of(folder_of(tmp_path, "llama3"), flag)


def test_flags_that_need_the_folders_shapes_wait_for_them(tmp_path):
    folder = folder_of(tmp_path, "gpt2_wide")
    # The default model has 4 heads and 4 layers; this one has 2 heads, and 1 layer.
    config_of(folder, "--tp=2")
    # It has a QK-norm, which --qk_clip refuses; Llama has none.
    assert config_of(folder_of(tmp_path, "llama"), "--qk_clip=100").qk_norm is False
    with pytest.raises(ValueError, match="qk_norm=gain undoes that"):
        config_of(folder_of(tmp_path, "qwen3"), "--qk_clip=100")
    with pytest.raises(ValueError, match="tp=4 does not divide n_head=2"):
        config_of(folder, "--tp=4")
    with pytest.raises(ValueError, match="n_layer is 1"):
        config_of(folder, "--pp=2")


def test_a_resumed_run_never_looks_at_the_folder_again(tmp_path, capsys):
    folder = folder_of(tmp_path, "gpt2")
    run_of(folder, tmp_path / "run", "--lr=0.1")
    shutil.rmtree(folder)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{")
    more = resume(tmp_path, folder, "--steps=2")
    assert more["step"] == 2
    shutil.rmtree(folder)
    assert resume(tmp_path, folder, "--steps=3")["step"] == 3
    with pytest.raises(ValueError, match="n_head=4, now it is 2"):
        resume(tmp_path, folder, "--steps=4", "--n_head=2")
    recipe = (tmp_path / "run" / "config.toml").read_text().partition("[chosen]")[0]
    assert "n_embd = 32" in recipe and 'activation = "gelu_tanh"' in recipe
    model, _ = sample.load(str(tmp_path / "run"))
    assert model.config.n_embd == 32


def resume(tmp_path, folder, *flags):
    from train import main

    words = [f"--init_from={folder}", f"--data={tmp_path / 'text.txt'}", "--batch_size=4"]
    words += [f"--out_dir={tmp_path / 'run'}", "--eval_tokens=256", "--plot=false"]
    return main(parse.parse([*words, "--sample_tokens=0", "--optim=sgd", "--lr=0.1", *flags]))


def test_names_of_other_versions_are_read_too(tmp_path):
    """Without the head's front, with buffers, and with a tied head that is saved twice."""
    for name, front in (("gpt2", "transformer."), ("qwen2", "model.")):
        config = CONFIGS[name]
        held = tensors_of(config, torch.float32)
        want = ours_of(folder_of(tmp_path, name))
        found = {key.removeprefix(front): x for key, x in held.items()}
        if name == "gpt2":
            found["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
            found["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            found["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        found["lm_head.weight"] = held[
            f"{front}{'wte' if name == 'gpt2' else 'embed_tokens'}.weight"
        ]
        found["lm_head.weight"] = found["lm_head.weight"].clone()
        write_folder(tmp_path / f"other-{name}", config, found)
        model = ours_of(tmp_path / f"other-{name}")
        for key, p in want.named_parameters():
            assert torch.equal(p, model.get_parameter(key)), key


@pytest.mark.parametrize(
    "family, missing, null",
    [("llama", 4, 4), ("mistral", 8, 4), ("qwen2", 32, 4), ("qwen3", 32, 4)],
)
def test_a_missing_key_is_transformers_default_and_null_is_none(family, missing, null):
    config = CONFIGS[family] | {"num_attention_heads": 4}
    assert families.fields_of(config | {"num_key_value_heads": None}).fields["n_kv_head"] == null
    del config["num_key_value_heads"]
    assert families.fields_of(config).fields["n_kv_head"] == missing
    del config["vocab_size"]
    for bad in (config, config | {"vocab_size": None}):
        with pytest.raises(ValueError, match="has no vocab_size"):
            families.fields_of(bad)
    window = families.fields_of(CONFIGS["mistral"] | {"sliding_window": None}).fields["window"]
    assert window is None
    without = {key: x for key, x in CONFIGS["mistral"].items() if key != "sliding_window"}
    assert families.fields_of(without).fields["window"] == 4096


def test_new_rows_of_a_vocabulary_are_the_mean_and_cost_little(tmp_path, capsys):
    folder = folder_of(tmp_path, "gpt2")
    plain = ours_of(folder, torch.float64)
    wide = ours_of(folder, torch.float64, "--vocab_size=320")
    mean = plain.embed.weight.mean(0)
    assert torch.allclose(wide.embed.weight[300:], mean.expand(20, -1), atol=1e-15)
    assert torch.equal(wide.embed.weight[:300], plain.embed.weight)
    ids = torch.randint(300, (2, 17))
    before = plain(ids[:, :-1], ids[:, 1:]) / 32
    after = wide(ids[:, :-1], ids[:, 1:]) / 32
    assert before < after <= before + torch.log(torch.tensor(320 / 300)) + 1e-9
    run_of(folder, tmp_path / "run", "--vocab_size=320", "--block_size=16")
    said = capsys.readouterr().out
    assert "20 rows are added to its vocabulary" in said and "the first 16 are taken" in said
    assert "embd_pdrop=0.1" in said


# ---- layouts -------------------------------------------------------------------------------------
def trained(rank, world, folder, out, *flags):
    words = ["--steps=3", "--optim=adamw", "--lr=1e-2", "--precision=fp64", "--opt.eps=1e-4"]
    return run_of(folder, out, *words, *flags)["val_loss"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--tp=2 --vocab_size=302", id="tp"),
        pytest.param("--pp=2", marks=pytest.mark.slow),
        pytest.param("--data_parallel=fsdp", marks=pytest.mark.slow),
        pytest.param("--data_parallel=zero3", id="zero3"),
        pytest.param("--tp=2 --sp=true", marks=pytest.mark.slow),
        pytest.param("--cp=2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("qwen2", marks=pytest.mark.slow),
        pytest.param("llama_linear", marks=pytest.mark.slow),
    ],
)
def test_a_sharded_folder_on_every_layout_is_one_process(tmp_path, name, flags):
    folder = folder_of(tmp_path, name, n_files=3)
    flags = flags.split()
    alone = [flag for flag in flags if "vocab" in flag]
    trained(0, 1, folder, tmp_path / "one", *alone)
    run_ranks(2, trained, folder, tmp_path / "two", *flags)
    one, two = (resolve(tmp_path / run).tree("model") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert (one[key] - two[key]).abs().max() < 1e-10, key


def measured(rank, world, folder, flags):
    """(bytes of tensors at most, bytes that this rank holds, bytes read) while weights are read."""
    cfg = with_traits(start.with_its_settings(parse.parse([f"--init_from={folder}", *flags])))
    mesh = make_mesh(torch.device("cpu"), cfg.tp, 1, 1)
    n_read = []
    read = tensor_file.TensorFile.read_bytes

    def counting(self, begin, out):
        n_read.append(len(out))
        read(self, begin, out)

    with Meter() as meter:
        with torch.device("meta"):
            model = GPT(build.model_config(cfg))
        split = tensor.split(model, mesh.groups["tp"])
        shards = {name: Shard(*where) for name, where in split.items()}
        names = {name for name, _ in model.named_parameters()}
        replicas = build.data_parallel(cfg, {}, mesh, shards, names)
        replicas.parallelize(model)
        tensor_file.TensorFile.read_bytes = counting
        meter.reset()
        replicas.init_weights(sharded(start.weights(folder), shards))
        tensor_file.TensorFile.read_bytes = read
    return meter.peak, nbytes(replicas.weights().values()), sum(n_read)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("gpt2", "--tp=2"),
        ("llama", "--data_parallel=zero3"),
        pytest.param("gpt2", "--data_parallel=zero3", marks=pytest.mark.slow),
        pytest.param("llama", "--tp=2", marks=pytest.mark.slow),
        pytest.param("llama", "--data_parallel=fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_rank_reads_its_part_alone_and_holds_little_more(tmp_path, monkeypatch, name, flags):
    folder = folder_of(tmp_path, name)
    monkeypatch.setattr(pretrained, "PIECE", 2**11)
    flags = [*flags.split(), "--attention=sdpa"]
    whole = sum(x.nbytes for x in tensors_of(CONFIGS[name], torch.float32).values())
    for peak, held, n_read in run_ranks(2, measured, folder, flags):
        assert held < 0.6 * whole
        assert peak <= 1.2 * held
        assert n_read <= 1.01 * held


# ---- nanoGPT and our own export ------------------------------------------------------------------
def nanogpt_file(path, bias: bool = True, front: str = "_orig_mod.", **changes):
    """What nanoGPT's train.py saves: Linear's matrices, a compiled model's names."""
    theirs = tensors_of(CONFIGS["gpt2"], torch.float32)
    model = {}
    for key, x in theirs.items():
        is_linear = x.ndim == 2 and ".h." in key
        if bias or not key.endswith(".bias"):
            model[front + key] = x.T.contiguous() if is_linear else x
    model[f"{front}lm_head.weight"] = model[f"{front}transformer.wte.weight"]
    args = dict(
        n_layer=2, n_head=4, n_embd=32, block_size=64, bias=bias, vocab_size=300, dropout=0.1
    )
    saved = dict(
        model=model,
        model_args=args,
        optimizer={"state": {0: {"exp_avg": torch.ones(3)}}},
        iter_num=5,
        best_val_loss=torch.tensor(2.0),
        config={"out_dir": "out", "compile": True},
    )
    torch.save(saved | changes, path)
    return theirs


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_file_is_read_and_can_go_on_to_transformers(tmp_path, bias, capsys):
    (tmp_path / "nano").mkdir()
    theirs = nanogpt_file(tmp_path / "nano" / "ckpt.pt", bias)
    with nothing_runs():
        model = ours_of(tmp_path / "nano")
        cfg = config_of(tmp_path / "nano" / "ckpt.pt")
    assert (cfg.activation, cfg.bias, cfg.block_size, cfg.tied) == ("gelu", bias, 64, True)
    want = theirs["transformer.h.1.attn.c_attn.weight"].T[32:64]
    assert torch.equal(model.blocks["1"].attn.k.weight, want)
    run_of(tmp_path / "nano", tmp_path / "run")
    tool.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format=hf"])
    assert ("biases are 0" in capsys.readouterr().out) == (not bias)
    again = ours_of(tmp_path / "out", torch.float64)
    ids = torch.randint(300, (1, 20))
    assert torch.allclose(again(ids), ours_of(tmp_path / "nano", torch.float64)(ids), atol=1e-12)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda mark: dict(extra=Payload(mark)), "no file of tensors and plain values"),
        (lambda mark: dict(model=Payload(mark)), "no file of tensors and plain values"),
        (lambda mark: dict(model=None), "no tables model and model_args"),
        (lambda mark: dict(model_args=[1]), "no tables model and model_args"),
        (lambda mark: dict(model_args={"n_layer": 2}), "has no n_head"),
        (lambda mark: dict(model={"w": 3}), "no plain tensor"),
    ],
)
def test_a_hostile_file_of_torch_runs_nothing(tmp_path, change, says):
    mark = tmp_path / "the-code-has-run"
    nanogpt_file(tmp_path / "ckpt.pt", **change(mark))
    with nothing_runs(), pytest.raises(ValueError, match=says) as error:
        config_of(tmp_path / "ckpt.pt")
    assert not mark.exists() and "\n" not in str(error.value)
    # The trap itself works.
    if "plain values" in says:
        torch.load(tmp_path / "ckpt.pt", weights_only=False)
        assert mark.exists()


def test_our_own_export_is_a_start(tmp_path):
    folder = folder_of(tmp_path, "gpt2_wide")
    run_of(folder, tmp_path / "run")
    out = tmp_path / "w.safetensors"
    tool.main(["export", str(tmp_path / "run"), str(out)])
    shape = "--arch=gpt2 --n_layer=1 --n_embd=32 --n_head=2 --mlp_width=72 --tied=false"
    shape += " --norm_eps=1e-3 --block_size=64"
    model = ours_of(out, torch.float32, *shape.split())
    assert model.config.vocab_size == 300
    for name, x in load_file(out).items():
        assert torch.equal(model.get_parameter(name), x)
    with pytest.raises(ValueError, match="does not fit: blocks.0.mlp.fc.weight"):
        config_of(out, *shape.replace("72", "64").split())
    with pytest.raises(ValueError, match="has no tensor blocks.1.attn_norm.weight"):
        config_of(out, *shape.replace("n_layer=1", "n_layer=2").split())
    model_file = folder_of(tmp_path, "qwen2", 1) / "model.safetensors"
    with pytest.raises(ValueError, match="give the folder"):
        config_of(model_file)


# ---- out -----------------------------------------------------------------------------------------
def ours_trained(tmp_path, *flags):
    """A run of our own, with a padded vocabulary."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    words = [f"--data={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'run'}", "--steps=1"]
    words += ["--n_layer=1", "--n_embd=32", "--n_head=2", "--block_size=16", "--batch_size=2"]
    words += ["--eval_tokens=256", "--plot=false", "--sample_tokens=0", *flags]
    from train import main

    main(parse.parse(words))
    return str(tmp_path / "run")


def test_a_large_export_is_several_files_and_an_index(tmp_path, monkeypatch):
    run = ours_trained(tmp_path, "--arch=qwen3", "--vocab_size=320", "--optim=adamw")
    monkeypatch.setattr(export, "LARGEST", 20000)
    monkeypatch.setattr(export.to_hugging_face, "__defaults__", (None, None, (), 20000))
    tool.main(["export", run, str(tmp_path / "out"), "--format=hf"])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = bits(tmp_path / "out")
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(len(x[2]) for x in found.values())
    sizes = [(tmp_path / "out" / file).stat().st_size for file in files]
    assert max(sizes) < 20000 + 2**12 + 256 * 32 * 4
    again = ours_of(tmp_path / "out")
    model, _ = sample.load(run)
    # Of the padded vocabulary the tokenizer's 256 words are left.
    assert found["model.embed_tokens.weight"][1] == (256, 32)
    ids = torch.randint(256, (1, 16))
    assert torch.allclose(again(ids), model(ids)[..., :256], atol=1e-6)


def test_a_vocabulary_is_cut_to_the_tokenizers_and_that_is_said(tmp_path, capsys):
    run = ours_trained(tmp_path, "--arch=gpt2", "--vocab_size=320", "--optim=adamw")
    tool.main(["export", run, str(tmp_path / "a"), "--format=hf"])
    assert "of 320 rows of the vocabulary the first 256 are written" in capsys.readouterr().out
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["vocab_size"] == 256 and config["eos_token_id"] == 0
    tool.main(["export", run, str(tmp_path / "b"), "--format=hf", "--vocab_size=300"])
    assert bits(tmp_path / "b")["transformer.wte.weight"][1] == (300, 32)
    for words, says in (
        (["a", "--format=hf"], "is there already"),
        (["c", "--format=hf", "--vocab_size=321"], "not among the 320"),
        (["c", "--format=gguf"], "no option of export"),
        (["c", "--vocab_size=300"], "is for --format=hf"),
        (["c.safetensors", "--format=dcp"], "is one file"),
    ):
        with pytest.raises(ValueError, match=says):
            tool.main(["export", run, str(tmp_path / words[0]), *words[1:]])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "flags, traits",
    [
        ("", "norm=rmsnorm, activation=relu2, qk_norm=True"),
        ("--arch=track3", "embed_norm=True"),
        ("--arch=llama --logit_cap=15 --head_bias=true", "head_bias=True, logit_cap=15.0"),
        ("--arch=llama --ngram_embed=3", "ngram_embed=3"),
        ("--arch=llama --mup_base_width=16", "mup_base_width=16"),
        ("--arch=gpt2 --ngram=2", "ngram=2"),
        ("--arch=gpt2 --activation=relu2 --n_kv_head=1", "n_kv_head"),
    ],
)
def test_a_run_that_no_family_has_is_refused_with_every_trait(tmp_path, flags, traits):
    run = ours_trained(tmp_path, *flags.split(), "--optim=adamw")
    with pytest.raises(ValueError, match="no family of transformers has") as error:
        tool.main(["export", run, str(tmp_path / "out"), "--format=hf"])
    for trait in traits.split(", "):
        assert trait in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def test_rows_that_we_have_added_are_cut_after_fine_tuning_too(tmp_path):
    pytest.importorskip("tokenizers")
    from test_tokenizer_json import KINDS, write

    there = write(tmp_path / "there", KINDS["byte_level"])
    n_words = len(KINDS["byte_level"]["model"]["vocab"])
    assert n_words % 64
    run = ours_trained(tmp_path, "--arch=llama", "--optim=adamw", f"--tokenizer={there}")
    (tmp_path / "again").mkdir()
    # The run brings its words, too.
    again = ours_trained(tmp_path / "again", f"--init_from={run}", "--optim=adamw")
    assert resolve(again).shape("model/embed.weight")[0] % 64 == 0
    assert "tokenizer.json" in exported(again, tmp_path / "out")
    assert bits(tmp_path / "out")["model.embed_tokens.weight"][1] == (n_words, 32)


def test_a_folders_tokenizer_comes_with_its_weights(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    from test_tokenizer_json import KINDS, write

    folder = folder_of(tmp_path, "llama", 1)
    words = KINDS["byte_level"]["model"]["vocab"]
    assert len(words) > 64  # the folder has fewer rows
    write(folder, KINDS["byte_level"])
    (tmp_path / "text.txt").write_text("to be or not to be " * 200)
    flags = [f"--init_from={folder}", f"--data={tmp_path / 'text.txt'}", "--block_size=16"]
    cfg = start.with_its_settings(parse.parse(flags))
    assert cfg.tokenizer == str(folder / "tokenizer.json")
    cfg = start.with_its_settings(parse.parse([*flags, "--tokenizer=bytes"]))
    assert cfg.tokenizer == "bytes"
    other = str(write(tmp_path / "other", KINDS["byte_level"]))
    cfg = start.with_its_settings(parse.parse([*flags, f"--tokenizer={other}"]))
    assert cfg.tokenizer == other


def exported(run: str, out) -> set[str]:
    tool.main(["export", run, str(out), "--format=hf"])
    return {path.name for path in out.iterdir()}


def test_a_run_on_bytes_takes_no_tokenizer_that_lies_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    run = ours_trained(tmp_path, "--arch=llama", "--optim=adamw")
    assert exported(run, tmp_path / "out") == {"config.json", "model.safetensors"}


def test_the_runs_own_tokenizer_goes_along(tmp_path):
    pytest.importorskip("tokenizers")
    from test_tokenizer_json import KINDS, write

    there = write(tmp_path / "there", KINDS["byte_level"])
    run = ours_trained(tmp_path, "--arch=llama", "--optim=adamw", f"--tokenizer={there}")
    raw = (there / "tokenizer.json").read_bytes()
    shutil.rmtree(there)  # the run has a copy
    out = tmp_path / "out"
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert exported(run, out) == files and (out / "tokenizer.json").read_bytes() == raw
    config = json.loads((out / "config.json").read_text())
    words = json.loads(raw)["model"]["vocab"]
    said = json.loads((out / "tokenizer_config.json").read_text())
    # Without it transformers makes a tokenizer of the family's class, with other tokens.
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    end = said["eos_token"]
    assert config["vocab_size"] == max(words.values()) + 1 and config["eos_token_id"] == words[end]
