"""Checkpoints: what a run has, what one holds, its weights in other programs' formats.

    python -m checkpoint list RUN
    python -m checkpoint show CHECKPOINT
    python -m checkpoint export RUN OUT.safetensors     the weights alone, in one file
    python -m checkpoint export RUN FOLDER              in torch.distributed.checkpoint's form
    python -m checkpoint export RUN FOLDER --format=hf [--vocab_size=50257] [--selection_bias=drop]

--format=hf: as transformers loads it; --vocab_size: rows to keep, if not the tokenizer's;
--selection_bias=drop: without the experts' bias in the choice, which transformers has not.

Exit status: 0 done; 2 a mistake, in one line.
"""

import math
import os
from pathlib import Path

from checkpoint.export import to_hugging_face
from checkpoint.families import longest
from checkpoint.load import load, resolve
from checkpoint.save import found, write_tensors
from checkpoint.slices import DTYPES, TENSOR, walk
from data import corpora
from data.tokenizer import Tokenizer, is_file, kept
from metrics.outlets import command
from run import build
from settings import parse
from settings.fields import Config, update, with_traits


def main(args: list[str]) -> None:
    """What the command line asks for. Raises ValueError for a user's mistake."""
    match args:
        case ["list", run]:
            list_checkpoints(run)
        case ["show", path]:
            show(path)
        case ["export", run, out, *options] if not run.startswith("--"):
            export_as(run, out, options_of(options))
        case _:
            raise ValueError(
                "say list RUN, show CHECKPOINT, or export RUN OUT.safetensors (or a FOLDER, with "
                "--format=hf for transformers)"
            )


def export_as(run: str, out: str, options: dict) -> None:
    kind = options.get("format")
    if kind is not None and out.endswith(".safetensors"):
        raise ValueError(f"--format={kind} is a folder; {out} is one file")
    if kind == "hf":
        export_hugging_face(run, out, options.get("vocab_size"), "selection_bias" in options)
    elif "vocab_size" in options:
        raise ValueError("--vocab_size= is for --format=hf, others get all rows")
    elif "selection_bias" in options:
        raise ValueError("--selection_bias=drop is for --format=hf, others get it")
    else:
        export(run, out)


def options_of(words: list[str]) -> dict:
    """{"format": "hf", "vocab_size": 50257} of the words behind export RUN FOLDER."""
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "--format" and value in ("hf", "dcp"):
            found["format"] = value
        elif name == "--vocab_size" and value.isascii() and value.isdecimal():
            found["vocab_size"] = int(value[:18])
        elif word == "--selection_bias=drop":
            found["selection_bias"] = value
        else:
            raise ValueError(
                f"{word[:100]!r} is no option of export; there are --format=hf, --format=dcp, and "
                "with hf --vocab_size=50257 and --selection_bias=drop"
            )
    return found


def list_checkpoints(run: str) -> None:
    """A line for each checkpoint: its step, its size, whether every byte is as it was written."""
    there = found(run)
    if not there:
        raise ValueError(f"{run} holds no checkpoints")
    for step, _, path in there:
        # Reading every byte takes a while, but only that shows what can be resumed.
        try:
            state = f"intact, {len(load(path).names())} tensors"
        except ValueError as e:
            state = str(e)
        size = sum(f.stat().st_size for f in path.iterdir())
        print(f"step {step:>8}  {size / 2**20:10.1f} MiB  {state}")


def show(path: str) -> None:
    """A line for each leaf of a checkpoint's tree."""
    checkpoint = resolve(path)

    def show_leaf(name: str, leaf) -> None:
        if leaf == TENSOR:
            e = checkpoint._tensors[name]
            size = math.prod(e["shape"]) * DTYPES[e["dtype"]].itemsize
            leaf = (
                f"{e['dtype']} {e['shape']}, {size:,} bytes in {checkpoint.n_slices(name)} slice(s)"
            )
        elif isinstance(leaf, dict):
            # JSON has no NaN and no infinity: the tree holds {"$": "nan"} in their place.
            leaf = leaf["$"]
        print(f"{name}: {leaf}")

    walk(checkpoint._tree, show_leaf)


def export(run: str, out: str) -> None:
    """The weights of a run or a checkpoint, as a safetensors file or a DCP folder at `out`."""
    checkpoint = resolve(run)
    weights = checkpoint.tree("model")
    # In training, log p of counted n-grams was added to the logits. The export has no counts.
    if checkpoint.tree("config", missing={}).get("ngram"):
        print(
            "these weights learned on top of counted n-grams (--ngram), and without them"
            " they are no language model"
        )
    if out.endswith(".safetensors"):
        # A kill leaves no half-written file under the name that was asked for.
        write_tensors(f"{out}.tmp", weights)
        os.replace(f"{out}.tmp", out)
    else:
        from torch.distributed import checkpoint as dcp

        # A folder cannot be replaced in one step, as a file can.
        if Path(out).exists():
            raise ValueError(
                f"{out} is there already; give a new folder, or a name in .safetensors"
            )
        dcp.save({"model": weights}, checkpoint_id=out, no_dist=True)
    print(f"{out}: {len(weights)} tensors of {checkpoint.path}")


def export_hugging_face(run: str, out: str, n_vocab: int | None, drop_bias: bool) -> None:
    """The weights of a run or a checkpoint as a folder that transformers loads."""
    checkpoint = resolve(run)
    cfg = with_traits(parse.from_dict(checkpoint.tree("config")))
    cfg = update(cfg, tokenizer=kept(cfg.tokenizer, checkpoint.path))
    files = tokenizer_files(cfg.tokenizer)
    tokenizer = tokenizer_of(cfg, n_vocab)
    # Rows that round the tokenizer's words up to 64 are ours. A pretrained model may have had more
    # rows of its own: there all stay.
    if n_vocab is None and tokenizer is not None:
        is_ours = cfg.init_from is None or cfg.vocab_size == -(-tokenizer.n_vocab // 64) * 64
        n_vocab = min(cfg.vocab_size, tokenizer.n_vocab) if is_ours else cfg.vocab_size
    end = None if tokenizer is None else tokenizer.end_of_text
    lines = to_hugging_face(
        checkpoint, resolved(cfg), Path(out), n_vocab, end, files, drop_bias=drop_bias
    )
    for line in [*lines, *about_length(cfg)]:
        print(f"{out}: {line}")
    print(f"{out}: {checkpoint.path}, for transformers")


def resolved(cfg: Config) -> dict:
    """Its settings, with numbers for what follows from others."""
    model = build.model_config(cfg)
    usual_eps = 1e-5 if model.norm == "layernorm" else 1e-6
    return vars(cfg) | {
        "head_dim": model.head_size,
        "mlp_width": model.mlp_size,
        "expert_width": model.expert_size,
        "norm_eps": model.norm_eps or usual_eps,
        "qkv_bias": model.bias if model.qkv_bias is None else model.qkv_bias,
    }


def tokenizer_of(cfg: Config, n_vocab: int | None) -> Tokenizer | None:
    """The run's tokenizer; None where it is not to be had, and not needed.

    Raises ValueError where it alone knows how many rows of the vocabulary are words.
    """
    try:
        return corpora.tokenizer_of(cfg.data, cfg.tokenizer, cfg.vocab_size)
    except ValueError as e:
        if n_vocab is None and cfg.init_from is None:
            raise ValueError(f"{e}; or say how many words it has: --vocab_size=50257") from None
    return None


def tokenizer_files(tokenizer: str) -> tuple[Path, ...]:
    """The tokenizer.json that the run has, and what lies beside it."""
    if not is_file(tokenizer):
        return ()
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return tuple(folder / name for name in names if (folder / name).is_file())


def about_length(cfg: Config) -> list[str]:
    if cfg.position == "learned":
        return []
    tokens = longest(vars(cfg))
    why = "the block_size of this run" if tokens == cfg.block_size else "as its rope_scaling says"
    return [f"max_position_embeddings is {tokens}, {why}"]


if __name__ == "__main__":
    command("checkpoint", main, OSError)
