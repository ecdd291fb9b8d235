"""Forward and backward on micro-batches: a plain loop, or through the stages of a pipeline.

    sample ids of this rank      0 1 2 3 4 5 6 7
    micro-batches                [0 1] [2 3] [4 5] [6 7]
    forward_backward             each micro-batch forward and backward; gradients add up
    evaluate                     each micro-batch forward, and on_loss sees its loss

The last micro-batch completes the gradients, so its backward starts the sum over the replicas.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.dataset import Dataset
from layers.compile import own_gradients
from precision import amp


class MicroBatches:
    """What one rank computes of a batch.

    model: this rank's stage and shards; replicas: its data-parallel layout; pipe: its stage of a
    pipeline, or None; position_ids: (T,) the positions in a sequence whose tokens this rank has;
    hidden: (width, dtype, divisor of the length in training) of the hidden states that the stages
    of a pipeline send each other.
    """

    def __init__(
        self,
        model: nn.Module,
        replicas,
        pipe,
        device: torch.device,
        precision: str,
        position_ids: Tensor,
        hidden: tuple[int, torch.dtype, int],
    ):
        self.model = model
        self.replicas = replicas
        self.pipe = pipe
        self.device = device
        self.precision = precision
        self.position_ids = position_ids
        self.hidden = hidden
        # layers/compile.py says what CUDA graphs need.
        self.has_cuda_graphs = getattr(model, "has_cuda_graphs", False)
        if self.has_cuda_graphs:
            own_gradients(model)

    def begin(self) -> None:
        """Before a forward whose blocks may overwrite what earlier ones have computed."""
        if self.has_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def forward(self, sample_ids, dataset: Dataset, layers=None, x: Tensor | None = None):
        """The sum of the token losses of these samples, and their targets (B, T).

        In a pipeline: through these layers alone, from x, the hidden states (B, T, C) of the stage
        before. All stages but the last return hidden states in place of the loss.
        """
        if self.pipe is None:
            self.begin()
        tokens = dataset(sample_ids)  # (B, T+1) int64
        # Only from pinned memory does a copy with non_blocking=True not wait.
        if self.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(self.device, non_blocking=True)
        inputs = tokens[:, self.position_ids]
        targets = tokens[:, self.position_ids + 1]
        # Dropout masks depend on the sample, wherever it is computed.
        ids = None
        if self.model.config.dropout > 0:
            ids = torch.tensor(sample_ids, device=self.device)
        # Every stage of a pipeline, and every rank of a sequence, knows all of its documents.
        starts = self.model.document_starts(tokens[:, :-1])
        with amp.autocast(self.precision, self.device):
            out = self.model(
                inputs if x is None else x,
                targets,
                self.position_ids,
                ids,
                layers,
                document_starts=starts,
            )
        return out, targets

    def hidden_like(self, n: int, length: int) -> tuple:
        """Shape, dtype and device of the hidden states of n sequences between two stages."""
        # In training, sequence parallelism leaves each tp rank a share of the tokens to send on; an
        # evaluation sends all of them.
        width, dtype, divisor = self.hidden
        if self.model.training:
            length //= divisor
        return (n, length, width), dtype, self.device

    def forward_backward(self, batches: list, dataset: Dataset, scale: float) -> Tensor | float:
        """Gradients of the summed loss times `scale`, added to what is there.

        batches: sample ids, a list for each micro-batch. Returns the sum of the losses; 0 on the
        ranks of a pipeline that are not its last stage.
        """

        def forward(i: int, layers=None, x=None) -> Tensor:
            return self.forward(batches[i], dataset, layers, x)[0]

        if self.pipe is not None:
            return sum(self.through_pipeline(batches, forward, scale))

        # The plain loop. The layout learns which backward is the last: that one starts to send.
        total = 0.0
        for i in range(len(batches)):
            self.replicas.last_micro_batch(i + 1 == len(batches))
            loss = forward(i)
            (loss * scale).backward()
            # Not item(): Python would wait for the GPU after each micro-batch.
            total = total + loss.detach()
        return total

    def evaluate(self, batches: list, dataset: Dataset, on_loss: Callable) -> None:
        """Forward alone: on_loss(i, loss, targets) sees the loss of micro-batch i.

        In a pipeline the last stage alone has losses.
        """

        def forward(i: int, layers=None, x=None) -> Tensor:
            out, targets = self.forward(batches[i], dataset, layers, x)
            is_loss = out.ndim == 0  # hidden states are for the next stage
            if is_loss:
                on_loss(i, out, targets)
            return out

        if self.pipe is not None:
            self.through_pipeline(batches, forward, None)
            return
        for i in range(len(batches)):
            forward(i)

    def through_pipeline(self, batches: list, forward: Callable, scale: float | None) -> list:
        # A stage must know the shape of what it receives before it arrives.
        like = [self.hidden_like(len(ids), len(self.position_ids)) for ids in batches]
        before_backward = self.replicas.last_micro_batch
        # Forwards of several micro-batches wait for their backward: all of them are one step.
        self.begin()
        return self.pipe.run(len(batches), forward, like.__getitem__, scale, before_backward)

    def logits(self, ids: Tensor, position_ids: Tensor, **more) -> Tensor:
        """(B, T) token ids -> (B, T, V), by all stages of a pipeline, the same on all ranks.

        more: with document_mask document_starts, as the model takes them.
        """
        if self.pipe is None:
            return self.model(ids, position_ids=position_ids, **more)
        n_logits = self.model.config.vocab_size
        return self.pipe.logits(self.model, self.hidden_like, n_logits, ids, position_ids, **more)
