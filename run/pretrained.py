"""--init_from=: whose weights a run starts with, and the settings that they bring.

A run or checkpoint of ours, our own export, or a folder of another program (checkpoint/
pretrained.py). What it says of its model fills the settings that the command leaves open; from then
on they are the run's own, in its config.toml, and a resumed run never looks there again. Our own
export says nothing but its vocabulary's size.
"""

import torch

from checkpoint import families, load, pretrained
from checkpoint.pretrained import Pretrained
from data.tokenizer import kept
from data.tokenizer_json import FILE
from layers import rope_scaling
from model import GPT
from run import build
from settings import checks, parse
from settings.fields import CHOSEN, Config, flag, head_size, mlp_size, update, with_traits

# Settings whose none follows from others: it is no value that could be another one there.
DERIVED = (*CHOSEN, "mlp_width", "expert_width", "head_dim", "qkv_bias", "norm_eps")
# Settings that may come from there.
BROUGHT = [*families.BROUGHT, "logit_cap_form", "ngram_rows"]


def with_its_settings(cfg: Config) -> Config:
    """cfg of a new run, with what --init_from= says of its model where cfg leaves it open.

    Raises ValueError for a setting that was given and is another one there, for a folder that
    cannot be read, and for tensors that do not fit.
    """
    if cfg.init_from is None:
        return cfg
    found = pretrained.find(cfg.init_from)
    said = brought_by_run(cfg) if found is None else brought(cfg, found)
    values = {}
    for name, there in said.items():
        given = getattr(cfg, name)
        is_open = given == "auto" or (given is None and name in DERIVED)
        if name not in cfg.given or is_open:
            values[name] = there
        elif name != "tokenizer":  # the same ids may come from another file, or from shards
            check_agrees(cfg, name, given, there)
    new = update(cfg, **values)
    # As if a command had given them: config.toml has them among its settings.
    new.given -= values.keys()
    new.given_earlier |= values.keys()
    checks.check(new)
    if found is not None:
        found.check(shapes(new))
    return new


def brought_by_run(cfg: Config) -> dict:
    """Setting -> value, of those of a run of ours that its weights depend on.

    But not --ngram=, whose counts are of a text.
    """
    checkpoint = load.resolve(cfg.init_from)
    saved = checkpoint.tree("config", missing={})
    if not saved:
        return {}  # a checkpoint that somebody has saved without settings
    old = with_traits(parse.from_dict(saved))
    said = {name: getattr(old, name) for name in BROUGHT if name != "ngram"}
    said |= {"head_dim": head_size(old), "mlp_width": mlp_size(old)}
    if old.n_expert is None:
        # A model without experts has no traits of them.
        for name in set(families.OF_EXPERTS) - {"n_expert"}:
            del said[name]
    else:
        said["expert_width"] = build.model_config(old).expert_size
    said["qkv_bias"] = old.bias if old.qkv_bias is None else old.qkv_bias
    said["tokenizer"] = kept(old.tokenizer, checkpoint.path)
    # What a token sees is a method, not a shape: another one may be typed.
    for name in {"document_mask", "document_token"} - cfg.given:
        said[name] = getattr(old, name)
    if old.position != "learned":
        del said["block_size"]
    return said


def brought(cfg: Config, found: Pretrained) -> dict:
    """Setting -> value, of those that the folder or file decides."""
    if found.described is None:
        return {"vocab_size": found.shape("embed.weight")[0]}
    said = {name: value for name, value in found.described.fields.items() if value != "auto"}
    # Learned positions are as many as there are; others have no end.
    length = cfg.block_size if "block_size" in cfg.given else said.get("block_size", cfg.block_size)
    # A window that no sequence fills changes nothing.
    if said["window"] is not None and said["window"] >= length:
        said["window"] = None
    # Its ids mean its own words.
    if (found.path / FILE).exists():
        said["tokenizer"] = str(found.path / FILE)
    return said


def check_agrees(cfg: Config, name: str, given, there) -> None:
    """Raises ValueError where the command gives a setting another value than the folder."""
    path = cfg.init_from
    if given == there:
        return
    # A larger vocabulary is padded, and of learned positions the first are taken.
    if name == "vocab_size" and given > there or name == "block_size" and given < there:
        return
    if name == "rope_scaling" and None not in (given, there):
        if rope_scaling.parse(given) == rope_scaling.parse(there):
            return
    least = {"vocab_size": ", or more", "block_size": ", or less"}.get(name, "")
    raise ValueError(
        f"{path} has {flag(name, there)[2:]} and the command {flag(name, given)}; leave it out, or "
        f"type {flag(name, there)}{least}"
    )


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the model's weights: parameters, and the experts' biases in the choice."""
    with torch.device("meta"):
        model = GPT(build.model_config(update(with_traits(cfg), attention="sdpa")))
    kept = model.state_dict().keys()  # not what a step counts
    held = [(n, x) for n, x in [*model.named_parameters(), *model.named_buffers()] if n in kept]
    return {name: tuple(x.shape) for name, x in held}


def weights(path: str):
    """The weights at `path` as a source for a layout's init_weights. Raises ValueError."""
    found = pretrained.find(path)
    return load.resolve(path).weights("model") if found is None else found.weights()


def notes(cfg: Config) -> list[str]:
    """What is worth a sentence where a run begins with weights of another program."""
    found = pretrained.find(cfg.init_from)
    if found is None or found.described is None:
        return []
    said = found.described
    path = cfg.init_from
    lines = [f"{path}: {note}" for note in said.notes]
    window = said.fields["window"]
    if window != cfg.window:
        lines.append(
            f"{path}: no sequence of {cfg.block_size} fills its window of {window} tokens, so this "
            "run has none, and its exports too"
        )
    if cfg.block_size < said.fields.get("block_size", 0):
        lines.append(
            f"{path}: of its {said.longest} positions the first {cfg.block_size} are taken"
        )
    if cfg.block_size > said.longest:
        lines.append(
            f"block_size={cfg.block_size}: {path} was made for sequences of {said.longest} tokens"
        )
    if cfg.n_expert is not None and cfg.moe_bias_lr is not None:
        lines.append(
            f"{path}: a {said.family} has no bias in the choice of experts, and --moe_bias_lr="
            f"{cfg.moe_bias_lr:g} moves this run's; --moe_bias_lr=none keeps it exportable as one"
        )
    n_new = cfg.vocab_size - said.fields["vocab_size"]
    if n_new:
        lines.append(
            f"{path}: {n_new} rows are added to its vocabulary, each the mean of those there"
        )
    return lines
