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


def main(args):
    match args:
        case ["list", run] if found(run):
            for step, _, path in found(run):
                try:
                    state = f"intact, {len(load(path).names())} tensors"
                except ValueError as e:
                    state = str(e)
                size = sum(f.stat().st_size for f in path.iterdir())
                print(f"step {step:>8}  {size / 2**20:10.1f} MiB  {state}")
        case ["list", run]:
            raise ValueError(f"{run} holds no checkpoints")
        case ["show", path]:
            checkpoint = resolve(path)

            def show(name, leaf):
                if leaf == TENSOR:
                    e = checkpoint._tensors[name]
                    size = math.prod(e["shape"]) * DTYPES[e["dtype"]].itemsize
                    leaf = (
                        f"{e['dtype']} {e['shape']}, {size:,} bytes in {len(e['slices'])} slice(s)"
                    )
                print(f"{name}: {leaf['$'] if isinstance(leaf, dict) else leaf}")

            walk(checkpoint._tree, show)
        case ["export", run, out]:
            checkpoint = resolve(run)
            weights = checkpoint.tree("model")
            if checkpoint.tree("config", missing={}).get("ngram"):
                print(
                    "these weights learned on top of counted n-grams (--ngram), and without them"
                    " they are no language model"
                )
            if out.endswith(".safetensors"):
                write_tensors(f"{out}.tmp", weights)
                os.replace(f"{out}.tmp", out)
            else:
                from torch.distributed import checkpoint as dcp

                if Path(out).exists():
                    raise ValueError(
                        f"{out} is there already; give a new folder, or a name in .safetensors"
                    )
                dcp.save({"model": weights}, checkpoint_id=out, no_dist=True)
            print(f"{out}: {len(weights)} tensors of {checkpoint.path}")
        case _:
            raise ValueError(
                "say list RUN, show CHECKPOINT, or export RUN OUT.safetensors (or a FOLDER)"
            )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        print(f"checkpoint: {e}", file=sys.stderr)
        sys.exit(2)
