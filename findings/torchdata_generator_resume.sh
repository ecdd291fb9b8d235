#!/usr/bin/env bash
# torchdata's StatefulDataLoader, shuffled: the epochs after one that was resumed in its middle, with and without a generator.
# Packages: torchdata==0.11.0 torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torchdata==0.11.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""A generator that is handed over also draws the seed of each epoch's workers, and loading takes it back before that.

Seen: without one, all three epochs of the resumed run are those of the uninterrupted one; with one the
rest of the first epoch is, the second and third come in another order. The docs of the class speak of
resuming in the middle of an epoch and do not except a generator."""
import torch
from torchdata.stateful_dataloader import StatefulDataLoader


def loader(own: bool) -> StatefulDataLoader:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7) if own else None
    return StatefulDataLoader(range(12), batch_size=4, shuffle=True, generator=generator)


def epoch(batches) -> list[int]:
    return [i for batch in batches for i in batch.tolist()]


for own in False, True:
    first = loader(own)
    batches = iter(first)
    next(batches)
    saved = first.state_dict()
    straight = [epoch(batches), epoch(first), epoch(first)]
    second = loader(own)
    second.load_state_dict(saved)
    resumed = [epoch(second) for _ in range(3)]
    same = [x == y for x, y in zip(straight, resumed)]
    print(f"generator of one's own: {own}; epochs alike: {same}")
    print(f"  uninterrupted {straight[1]}\n  resumed       {resumed[1]}")
    assert same == ([True, False, False] if own else [True, True, True])
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
