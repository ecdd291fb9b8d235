"""The job of `bench.py layouts`: one GPT, one batch, one optimizer, for both sides of a row.

    cut       a layout's own part of it       ours: layouts_ours.py, the peers': layouts_peers.py
    step(i)   forward, backward, AdamW        returns this rank's part of the mean loss of a token

Weights are functions of their names (model.py), tokens of the step and of the replica. The four
batches come in turn, so the loss falls, and a wrong update shows in the losses after it.
"""

import dataclasses

import torch
from torch import Tensor

from model import GPT, GPTConfig, initial_weight


@dataclasses.dataclass(frozen=True)
class Job:
    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    vocab_size: int
    sequences: int  # of a rank's micro-batch; of all ranks together, where they share a batch
    micro_batches: int = 1
    world: int = 1
    rank: int = 0
    norm: str = "rmsnorm"

    def config(self) -> GPTConfig:
        return GPTConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_kv_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            norm=self.norm,
            # Else the first gradients of most matrices are zero.
            zero_init=False,
        )

    def batch(self, i: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each, of step i. part: whose, or which micro-batch."""
        generator = torch.Generator().manual_seed(1000 * part + i % 4)
        shape = self.sequences, self.block_size + 1
        tokens = torch.randint(self.vocab_size, shape, generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    def replicas_batches(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of this rank, where each rank has samples of its own."""
        first = self.rank * self.micro_batches
        return [self.batch(i, first + k) for k in range(self.micro_batches)]

    def all_batches(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """The micro-batches of a step, where all ranks have the same."""
        return [self.batch(i, k) for k in range(self.micro_batches)]

    @property
    def tokens(self) -> int:
        """Of a rank's share of a step; of the step, where all ranks have the same."""
        return self.sequences * self.block_size * self.micro_batches

    def source(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return initial_weight(self.config(), name, shape)

    def empty_model(self, layers=None) -> GPT:
        """On the meta device, as train.py makes it."""
        with torch.device("meta"):
            return GPT(self.config(), layers)

    @torch.no_grad()
    def model(self, layers=None) -> GPT:
        """With its weights, as torch's own layouts take it."""
        model = GPT(self.config(), layers)
        for name, p in model.named_parameters():
            p.copy_(self.source(name, tuple(p.shape)))
        return model


def adamw(params, **arguments) -> torch.optim.Optimizer:
    """On both sides. Fused: one kernel for all parameters, also where they are DTensors."""
    return torch.optim.AdamW(params, **OPTIONS, **arguments)


OPTIONS = dict(lr=1e-3, fused=True)
