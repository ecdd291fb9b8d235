"""States of a run in host memory, to which a rollback returns."""

import torch


class SnapshotBuffer:
    """The last few states of what this rank holds; each comes back bit for bit, on every layout.

    A state has the model's parameters (local shards; none where ZeRO-3 has freed them), the
    optimizer's (shards, full tensors of their owners, offloaded ones), its state, the counters of
    its groups, and `kept`: objects with state_dict() and load_state_dict(). The residuals of
    gradient compression and DiLoCo's outer step are not in it. Nothing is sent, and checkpoints do
    not hold these states. Bytes of host memory: capacity x (weights + state here), in float32
    AdamW 12 a parameter.

    every: steps between two states.
    """

    def __init__(self, capacity: int, every: int, model, optimizer, kept=()):
        self.capacity = capacity
        self.every = every
        self.model = model
        self.optimizer = optimizer
        self.kept = kept
        self.states = []  # oldest first

    @torch.no_grad()
    def snapshot(self, step: int, more=None) -> None:
        """Before each step: every `every` steps the state goes into memory, and `more` with it."""
        if self.states:
            newest_step = self.states[-1][0]
            if step % self.every != 0 or step <= newest_step:
                return
        # Make room first: there are never more than `capacity` states in memory.
        del self.states[: len(self.states) - self.capacity + 1]

        # The model and the optimizer often share a parameter: its memory is copied once. One that
        # ZeRO-3 has freed has no memory.
        groups = self.optimizer.param_groups
        parameters = [*self.model.parameters()]
        for group in groups:
            parameters += group["params"]
        weights = {}
        for p in parameters:
            here = local(p)
            if here.untyped_storage().nbytes() > 0:
                key = (here.data_ptr(), here.shape)
                if key not in weights:
                    weights[key] = (p, here.to("cpu", copy=True))

        optimizer_state = {}
        for p, entries in self.optimizer.state.items():
            optimizer_state[p] = {key: copy_to_host(x) for key, x in entries.items()}
        counters = []
        for group in groups:
            counters.append({k: x for k, x in group.items() if k not in ("params", "names")})
        kept = [part.state_dict() for part in self.kept]
        self.states.append((step, more, [*weights.values()], optimizer_state, counters, kept))

    @torch.no_grad()
    def restore(self, before: int, back: int = 1) -> tuple:
        """Puts back the back-th newest state older than step `before`, or the oldest one.

        Returns (its step, the `more` that came with it).
        """
        # Newer states have seen what is now undone. One state always stays.
        older = sum(state[0] < before for state in self.states)
        del self.states[max(older - back, 0) + 1 :]
        step, more, weights, optimizer_state, counters, kept = self.states[-1]

        for p, saved in weights:
            local(p).copy_(saved)
        # A parameter that has had its first step since then had no state.
        now = self.optimizer.state
        for p in now.keys() - optimizer_state.keys():
            del now[p]
        for p, entries in optimizer_state.items():
            for key in now[p].keys() - entries.keys():
                del now[p][key]  # an average that has begun since then
            for key, saved in entries.items():
                if torch.is_tensor(saved):
                    # In place: with offloading the memory of this tensor may be a file.
                    saved = now[p][key].copy_(saved)
                now[p][key] = saved
        for group, counter in zip(self.optimizer.param_groups, counters):
            group.update(counter)
        for part, state in zip(self.kept, kept):
            part.load_state_dict(state)
        return step, more


def local(p: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter: the local shard of a DTensor, else the tensor itself."""
    return p.to_local() if hasattr(p, "placements") else p.detach()


def copy_to_host(x):
    return x.to("cpu", copy=True) if torch.is_tensor(x) else x
