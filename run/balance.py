"""The experts' loads in all layers, from the first micro-batch of a step to the bias after it.

    begin(loss_scale)     before the step's first forward: no token is counted yet
    forward, backward     each layer counts the tokens of its experts (layers/moe.py)
    finish_counts()       the counts become those of the whole batch, over all replicas
    step()                moves each expert's bias in the choice; not for a step that is not taken

One all-reduce a step: 8 bytes x (experts + 3) a layer. A model without experts sends nothing.

A bias is a buffer of its layer, and no parameter: layouts do not divide it, optimizers do not see
it. In a checkpoint it is among the weights, for whoever samples needs it too.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layers.moe import TERMS, MoE, update_bias
from parallel.replicas import fill


class Balance:
    """model: this rank's layers; group: the ranks with other tokens, None: there are none;
    bias_lr: γ, None: biases stay where they are."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        bias_lr: float | None = None,
    ):
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, MoE)}
        self.group = group
        self.bias_lr = bias_lr
        n = len(self.layers)
        n_expert = max((len(layer.experts) for layer in self.layers.values()), default=0)
        # A sign of 1/1000 would be lost in bfloat16's weights.
        wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self.bias = torch.zeros(n, n_expert, dtype=wide, device=device)
        self.counts = torch.zeros(n, n_expert, dtype=torch.int64, device=device)
        self.terms = torch.zeros(n, len(TERMS), dtype=wide, device=device)
        for i, layer in enumerate(self.layers.values()):
            layer.selection_bias = self.bias[i]
            layer.counts = self.counts[i]
            layer.terms = self.terms[i]

    # ---- each step -------------------------------------------------------------------------------
    def begin(self, loss_scale: float) -> None:
        """loss_scale: what the sum of the token losses is multiplied by before backward()."""
        self.counts.zero_()
        self.terms.zero_()
        for layer in self.layers.values():
            layer.loss_scale = loss_scale

    def finish_counts(self) -> None:
        """After the last backward, on all ranks together."""
        if not self.layers or self.group is None:
            return
        # Counts pass through float64 exactly.
        both = torch.cat([self.counts.double(), self.terms.double()], 1)
        dist.all_reduce(both, group=self.group)
        n_expert = self.counts.shape[1]
        self.counts.copy_(both[:, :n_expert])
        self.terms.copy_(both[:, n_expert:])

    def step(self) -> None:
        if self.layers and self.bias_lr is not None:
            update_bias(self.bias, self.counts, self.bias_lr)

    def row(self, n_tokens: int) -> dict[str, float]:
        """What there is to log: the terms that are minimised, a token, summed over layers."""
        found = {}
        if self.layers:
            layer = next(iter(self.layers.values()))
            z_loss, sequence_loss, _ = (self.terms.sum(0) / n_tokens).tolist()
            if layer.z_loss is not None:
                found["moe_z_loss"] = z_loss
            if layer.sequence_loss is not None:
                found["moe_sequence_loss"] = sequence_loss
        return found

    def loads(self, n_tokens: int) -> tuple[list[int], Tensor, Tensor]:
        """After finish_counts(), for metrics/experts.py: the layers' numbers, tokens of each expert
        (layers, E), the mean of the router's log Z (layers,)."""
        numbers = [int(name.split(".")[1]) for name in self.layers]  # of blocks.3.mlp
        return numbers, self.counts, self.terms[:, TERMS.index("log_z")] / n_tokens

    # ---- what it remembers -----------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        """Name -> bias."""
        return {f"{n}.selection_bias": layer.selection_bias for n, layer in self.layers.items()}

    def init_weights(self, source: Callable) -> None:
        """Fills every bias from source(its name, its shape), as a layout its weights."""
        for name, bias in self.weights().items():
            fill(bias, source, name)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy, for a rollback."""
        return {"bias": self.bias.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bias.copy_(state["bias"])
