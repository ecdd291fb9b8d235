"""A transformers model under its own tensor parallel plan, recorded, compared with one process.

It needs transformers (5.24.0 was tried). Type at the root:

    python -m examples.parity_transformers [llama qwen3 ...]

A tiny model with random weights is saved, and loaded by two forked processes on gloo with
tp_plan="auto"; three steps of AdamW in float64.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parity.compare import Comparison
from parity.diagnose import diagnose, report
from parity.record import Place, record
from parity.recording import Recording

VOCAB, BATCH, LENGTH, STEPS = 64, 4, 12, 3
SIZE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)


def save(kind: str, folder: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE))
    model.double().save_pretrained(f"{folder}/model")


def load(folder: str, **plan):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float64, **plan)


def train(model, recorder, optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6, foreach=False)


def one_rank(rank: int, world: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = load(folder, tp_plan="auto").train()

    alone = Recording(Path(folder, "alone"))

    def place(kind: str, name: str, x: torch.Tensor):
        """Modules return plain tensors: the oracle's shape tells in which dimension a share."""
        key = (1, "output", name)
        if kind == "parameter" or hasattr(x, "placements") or key not in alone.entries:
            return None
        full = alone.entries[key][0].shape
        index = [0 if n == size else rank * n for n, size in zip(x.shape, full)]
        return Place(full, tuple(index))

    optimizer = optimizer_of(model)
    axes = {"tp": (world, rank)}
    recorder = record(model, Path(folder, "tp"), optimizer, rank=rank, axes=axes, place=place)
    train(model, recorder, optimizer)
    dist.barrier()


def compared(kind: str, folder: str) -> str:
    """What parity says of this kind of model."""
    save(kind, folder)
    model = load(folder).train()
    optimizer = optimizer_of(model)
    train(model, record(model, Path(folder, "alone"), optimizer), optimizer)
    mp.start_processes(one_rank, (2, folder), nprocs=2, start_method="fork")
    comparison = Comparison(Recording(Path(folder, "alone")), Recording(Path(folder, "tp")))
    first = comparison.first()
    if first is None:
        return f"all {len(comparison.order)} tensors agree"
    return report(comparison, first, diagnose(comparison, first))


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    for kind in kinds or ["llama"]:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{kind}: {compared(kind, folder)}")


if __name__ == "__main__":
    main(sys.argv[1:])
