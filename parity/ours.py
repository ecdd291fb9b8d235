"""train.py's own run, recorded: on forked ranks, by its own main, from outside.

What train.py makes of a run passes through three names, which are replaced in the forked process:

    batch.split      the samples of a step: which row of the batch each sample id is
    MicroBatches     the model, and the samples of each forward
    State            layout, shards, optimizer: from here the recorder is made; its norm() sees the
                     summed gradients before they are clipped, and the experts' counts

A module's output lies in the batch by its samples, in the sequence by the position ids of its rank
(context and sequence parallelism), and in the width by the tensor parallel rank where the matrix is
cut by columns. What goes into attention, q, k and v with their positions, is recorded beside the
modules' outputs, as blocks.N.attn.rotated_q and so on; of a mixture of experts the router's logits,
the scores from which it chooses, and the choice.
"""

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import train
from checkpoint.state import State
from layers.moe import TERMS, MoE
from parallel import tensor
from parallel.shard import Shard, shard_of, shard_of_shard
from parity.record import Place, Recorder, clean, is_recorded
from run.microbatches import MicroBatches
from settings import fields

SKIPPED = Place((), None)  # for what is not recorded


class Run:
    """What the replaced names share while one rank trains."""

    def __init__(self, cfg: fields.Config, folder: Path):
        self.cfg = cfg
        self.folder = folder
        self.row_of = {}  # sample id -> its row of the step's batch
        self.rows = []  # of the forward at hand
        self.recorder = None

    # ---- in place of train.batch.split -----------------------------------------------------------
    def split(self, samples, mesh, size: int) -> list:
        self.after_step()
        self.row_of = {sample: row for row, sample in enumerate(samples)}
        return self.original_split(samples, mesh, size)

    def after_step(self) -> None:
        if self.recorder.has_gradients:
            # The step was skipped: its gradients were seen, and nothing came of them.
            self.recorder.end_step(self.weights())
        # The experts' biases as they are between two steps, whoever has moved them.
        layers = self.state.balance.layers
        self.recorder.selection_bias({clean(n): m.selection_bias for n, m in layers.items()})

    # ---- places ----------------------------------------------------------------------------------
    def place(self, kind: str, name: str, x: Tensor) -> Place | None:
        if kind == "parameter":
            return self.piece(name, x)
        if kind == "input":
            # Token ids and targets, no other argument; a pipeline's later stages get hidden states.
            tokens = len(self.positions)
            if x.ndim != 2 or x.shape[1] != tokens or name not in ("(0)", "(1)"):
                return SKIPPED
            return Place((len(self.row_of), self.length), (self.rows, self.positions))
        if x.ndim == 0:
            part = f"samples {self.rows[0]}, cp {self.mesh.coords['cp']}"
            return Place((), (), part)
        if ".experts" in name:
            return SKIPPED  # rows of any tokens; the layer's output has their sum
        if name.endswith(".router"):
            return SKIPPED  # recorded as logits
        if name == "(model)":
            return SKIPPED  # the hidden states of a pipeline's stage: its last block has them
        n = self.mesh.sizes["tp"]
        rank = self.mesh.coords["tp"]
        if x.ndim == 2:  # (T, C) of learned positions
            shape = (self.length, x.shape[1])
            if self.mine(x.shape[0]) is None:
                return SKIPPED
            # Its gradient is a sum over the samples.
            part = f"samples {self.rows[0]}" if kind == "output_gradient" else ""
            return Place(shape, (self.mine(x.shape[0]), 0), part)
        is_attention = name.rpartition(".")[2].startswith(("rotated_", "attended"))
        sequence_dim = 2 if is_attention else 1
        positions = self.mine(x.shape[sequence_dim])
        if positions is None:
            return SKIPPED
        if is_attention:  # (B, H, T, D)
            shape = (len(self.row_of), x.shape[1] * n, self.length, x.shape[3])
            return Place(shape, (self.rows, rank * x.shape[1], positions, 0))
        if tensor.ends(name, tensor.PARTIAL):  # (B, T, H, D)
            shape = (len(self.row_of), self.length, x.shape[2] * n, x.shape[3])
            return Place(shape, (self.rows, positions, rank * x.shape[2], 0))
        width = x.shape[2]
        if tensor.ends(name, (*tensor.COLUMN, "shared.gate", "shared.fc")):
            return Place(
                (len(self.row_of), self.length, width * n), (self.rows, positions, rank * width)
            )
        # Between f and g of experts a tensor parallel rank has its part of every sum.
        is_partial = kind == "output_gradient" and name.endswith("mlp.logits")
        is_partial |= kind == "output" and name.endswith("mlp.shared.proj")
        part = f"tp {rank}" if is_partial and n > 1 else ""
        return Place((len(self.row_of), self.length, width), (self.rows, positions, 0), part)

    def piece(self, name: str, x: Tensor) -> Place | None:
        """Where the rows that this rank owns lie, if x is theirs; None: x is all that is here."""
        here = self.here.get(name)
        if name not in self.state.replicas.shards or here is None or x.shape == here.shape:
            return None
        return Place(*self.state.replicas.shards[name])

    def mine(self, tokens: int) -> list[int] | None:
        """The positions of so many tokens: this rank's of its sequence, or of its share of them."""
        if tokens == len(self.positions):
            return self.positions
        if tokens * self.mesh.sizes["tp"] == len(self.positions):
            rank = self.mesh.coords["tp"]
            return self.positions[rank * tokens : (rank + 1) * tokens]
        return None

    # ---- what a rank holds -----------------------------------------------------------------------
    def start(self, micro_batches: MicroBatches, state: State) -> None:
        self.mesh = state.mesh
        self.positions = micro_batches.position_ids.tolist()
        self.length = len(self.positions) * self.mesh.sizes["cp"]
        self.state = state
        axes = {axis: (n, self.mesh.coords[axis]) for axis, n in self.mesh.sizes.items()}
        model = micro_batches.model
        self.model = model
        self.here = dict(model.named_parameters())
        self.recorder = Recorder(
            model,
            self.folder,
            self.mesh.rank,
            self.place,
            self.shards(model),
            axes,
        )
        for name, module in model.named_modules():
            if hasattr(module, "attention_fn"):
                module.attention_fn = self.seeing(name, module.attention_fn)
        for name, layer in state.balance.layers.items():
            self.see_choice(clean(name), layer)
        self.recorder.begin(self.weights())
        step = state.optimizer.step

        def recorded_step(*args, **kwargs):
            if self.cfg.grad_clip is not None or self.cfg.clip_value is not None:
                self.recorder.gradients(state.replicas.gradients())
            result = step(*args, **kwargs)
            groups = state.optimizer.param_groups
            self.recorder.end_step(self.weights(), groups)
            return result

        state.optimizer.step = recorded_step

    def shards(self, model: torch.nn.Module) -> dict[str, tuple]:
        """Name -> (full shape, offsets) of each parameter of which this rank has a shard."""
        found = dict(self.state.tp_shards)
        for name, p in model.named_parameters():
            if hasattr(p, "placements"):
                outer = found.get(name, Shard(tuple(p.shape), (0,) * p.ndim))
                found[name] = shard_of_shard(outer, shard_of(p))
        return found

    def weights(self) -> dict[str, Tensor]:
        """The weights that this rank holds, by name."""
        if hasattr(self.state.replicas, "owned_params") and self.state.replicas.stage == 3:
            return self.state.replicas.owned_params()
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.to_local() if hasattr(p, "placements") else p
        return found

    def seeing(self, name: str, attention_fn):
        def attend(q: Tensor, k: Tensor, v: Tensor, **documents) -> Tensor:
            if not is_recorded():
                return attention_fn(q, k, v, **documents)
            self.recorder.activation(f"{name}.rotated_q", q)
            self.recorder.activation(f"{name}.rotated_k", k)
            y = attention_fn(q, k, v, **documents)
            self.recorder.activation(f"{name}.attended", y)
            return y

        return attend

    # ---- experts ---------------------------------------------------------------------------------
    def see_choice(self, name: str, layer: MoE) -> None:
        score = layer.score
        choose = layer.choose
        is_next = False  # choose() is called a second time, without the bias, for a term

        def seen_score(logits: Tensor) -> Tensor:
            nonlocal is_next
            is_next = is_recorded()
            if is_next:
                self.recorder.activation(f"{name}.logits", logits)
            return score(logits)

        def seen_choose(scores: Tensor) -> Tensor:
            nonlocal is_next
            chosen = choose(scores)
            if is_next:
                is_next = False
                self.recorder.activation(f"{name}.biased_scores", scores)
                self.recorder.choice(name, chosen)
            return chosen

        layer.score = seen_score
        layer.choose = seen_choose

    def record_balance(self) -> None:
        for name, layer in self.state.balance.layers.items():
            terms = dict(zip(TERMS, layer.terms))
            self.recorder.balance(clean(name), layer.counts, terms)


def record_run(cfg: fields.Config, folder: Path) -> None:
    """train.main(cfg) on this rank, recorded into `folder`."""
    run = Run(cfg, folder)
    run.original_split = train.batch.split

    class RecordedMicroBatches(MicroBatches):
        def __init__(self, *args):
            super().__init__(*args)
            run.micro_batches = self

        def forward(self, sample_ids, *args):
            run.rows = [run.row_of.get(int(i), 0) for i in sample_ids]
            return super().forward(sample_ids, *args)

    class RecordedState(State):
        def __init__(self, *args):
            super().__init__(*args)
            run.start(run.micro_batches, self)

        def norm(self, gradients, everywhere=True):
            norm = super().norm(gradients, everywhere)
            # A second norm of a step is that of clipped values (--clip_value).
            if not run.recorder.has_gradients:
                run.recorder.gradients(gradients)
                run.recorder.norm(norm)
                run.record_balance()
            return norm

    train.batch.split = run.split
    train.MicroBatches = RecordedMicroBatches
    train.State = RecordedState
    train.main(cfg)
    run.after_step()
    run.recorder.close()


def record_ranks(cfg: fields.Config, folder: Path, ranks: int) -> None:
    """The run on `ranks` forked processes; each records itself.

    Raises ValueError for a user's mistake, RuntimeError where a rank fails for another reason.
    """
    import torch._dynamo  # once, not in every rank
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(
            "this system cannot fork ranks; record them under torchrun with parity/record.py, and"
            " type python -m parity A B"
        )
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = []
    sys.stdout.flush()
    for rank in range(ranks):
        process = context.Process(target=one_rank, args=(rank, ranks, cfg, folder, queue))
        process.start()
        processes.append(process)
    wait(processes)
    failures = []
    while not queue.empty():
        failures.append(queue.get())
    mistakes = [text for is_mistake, text in failures if is_mistake]
    if mistakes:
        raise ValueError(mistakes[0])
    if failures or any(process.exitcode for process in processes):
        text = failures[0][1] if failures else "a rank died"
        raise RuntimeError(text)


def wait(processes: list) -> None:
    """Until all have ended. Where one fails, the others, which may wait for it, are ended soon."""
    running = {process.sentinel: process for process in processes}
    patience = None
    while running:
        ended = multiprocessing.connection.wait(list(running), patience)
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                patience = 5.0
        if not ended:
            for process in running.values():
                process.terminate()


def one_rank(rank: int, world: int, cfg: fields.Config, folder: Path, queue) -> None:
    torch.set_num_threads(1)
    try:
        if world > 1:
            store = dist.FileStore(str(folder / "store"), world)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
        with contextlib.redirect_stdout(io.StringIO()):
            record_run(cfg, folder)
        if world > 1:
            dist.barrier()
    except BaseException as error:
        is_mistake = isinstance(error, ValueError)
        queue.put((is_mistake, str(error) if is_mistake else traceback.format_exc()))
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)
