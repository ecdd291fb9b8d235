"""The experts' loads in all layers, from the first micro-batch of a step to the bias after it.

    begin(loss_scale)     before the step's first forward: no token is counted yet
    forward, backward     each layer counts the tokens of its experts (layers/moe.py)
    finish_counts()       the counts become those of the whole batch and model, over all ranks
    step()                moves each expert's bias in the choice; not for a step that is not taken

An all-reduce a step over the replicas, and one over the stages of a pipeline: 8 bytes x (experts +
3) a layer. A model without experts sends nothing.

A bias is a buffer of its layer, and no parameter: layouts do not divide it, optimizers do not see
it. In a checkpoint it is among the weights, for whoever samples needs it too.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layers.moe import TERMS, update_bias
from parallel.mesh import Mesh
from parallel.replicas import fill


class Balance:
    """model: this rank's layers; mesh: its groups; bias_lr: γ, None: biases stay where they are.

    counts (layers, E), terms (layers, 3) and bias (layers, E) have a row for each layer of the
    whole model that has experts.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, bias_lr: float | None = None):
        self.config = model.config
        # Tensor parallel ranks count the same tokens; stages of a pipeline have other layers.
        self.groups = [mesh.groups[name] for name in ("dp_cp", "pp") if mesh.groups[name]]
        self.bias_lr = bias_lr
        self.numbers = [i for i in range(self.config.n_layer) if self.config.has_experts(i)]
        shape = (len(self.numbers), self.config.n_expert or 0)
        # A sign of 1/1000 would be lost in bfloat16's weights.
        wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self.bias = torch.zeros(shape, dtype=wide, device=mesh.device)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=mesh.device)
        self.terms = torch.zeros(shape[0], len(TERMS), dtype=wide, device=mesh.device)
        self.layers = {}  # name -> layer, of those here
        for row, number in enumerate(self.numbers):
            if str(number) in model.blocks:
                layer = model.blocks[str(number)].mlp
                layer.selection_bias = self.bias[row]
                layer.counts = self.counts[row]
                layer.terms = self.terms[row]
                self.layers[f"blocks.{number}.mlp"] = layer

    # ---- each step -------------------------------------------------------------------------------
    def begin(self, loss_scale: float) -> None:
        """loss_scale: what the sum of the token losses is multiplied by before backward()."""
        self.counts.zero_()
        self.terms.zero_()
        for layer in self.layers.values():
            layer.loss_scale = loss_scale

    def finish_counts(self) -> None:
        """After the last backward, on all ranks together."""
        if not self.numbers or not self.groups:
            return
        # Counts pass through float64 exactly.
        both = torch.cat([self.counts.double(), self.terms.double()], 1)
        for group in self.groups:
            dist.all_reduce(both, group=group)
        n_expert = self.counts.shape[1]
        self.counts.copy_(both[:, :n_expert])
        self.terms.copy_(both[:, n_expert:])

    def step(self) -> None:
        if self.numbers and self.bias_lr is not None:
            update_bias(self.bias, self.counts, self.bias_lr)

    def row(self, n_tokens: int) -> dict[str, float]:
        """What there is to log: the terms that are minimised, a token, summed over layers."""
        found = {}
        if self.numbers:
            z_loss, sequence_loss, _ = (self.terms.sum(0) / n_tokens).tolist()
            if self.config.router_z_loss is not None:
                found["moe_z_loss"] = z_loss
            if self.config.moe_sequence_loss is not None:
                found["moe_sequence_loss"] = sequence_loss
        return found

    def loads(self, n_tokens: int) -> tuple[list[int], Tensor, Tensor]:
        """After finish_counts(), for metrics/experts.py: the layers' numbers, tokens of each expert
        (layers, E), the mean of the router's log Z (layers,)."""
        return self.numbers, self.counts, self.terms[:, TERMS.index("log_z")] / n_tokens

    # ---- what it remembers -----------------------------------------------------------------------
    def weights(self) -> dict[str, Tensor]:
        """Name -> bias, of the layers here."""
        return {f"{n}.selection_bias": layer.selection_bias for n, layer in self.layers.items()}

    def init_weights(self, source: Callable) -> None:
        """Fills every bias from source(its name, its shape), as a layout its weights.

        Those of other stages, too: every rank moves all of them alike.
        """
        for number, bias in zip(self.numbers, self.bias):
            fill(bias, source, f"blocks.{number}.mlp.selection_bias")

    def state_dict(self) -> dict[str, Tensor]:
        """A copy, for a rollback."""
        return {"bias": self.bias.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bias.copy_(state["bias"])
