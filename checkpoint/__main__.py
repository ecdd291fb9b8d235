"""Checkpoints: what a run has, what one holds, its weights in other programs' formats.

    python -m checkpoint list RUN
    python -m checkpoint show CHECKPOINT
    python -m checkpoint export RUN OUT.safetensors     the weights alone, in one file
    python -m checkpoint export RUN FOLDER              in torch.distributed.checkpoint's form

Exit status: 0 done; 2 a mistake, in one line.
"""

import math
import os
import sys
from pathlib import Path

from checkpoint.load import load, resolve
from checkpoint.save import found, write_tensors
from checkpoint.slices import DTYPES, TENSOR, walk


def main(args: list[str]) -> None:
    """What the command line asks for. Raises ValueError for a user's mistake."""
    match args:
        case ["list", run]:
            list_checkpoints(run)
        case ["show", path]:
            show(path)
        case ["export", run, out]:
            export(run, out)
        case _:
            raise ValueError(
                "say list RUN, show CHECKPOINT, or export RUN OUT.safetensors (or a FOLDER)"
            )


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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        print(f"checkpoint: {e}", file=sys.stderr)
        sys.exit(2)
