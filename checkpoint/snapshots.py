"""States of a run in host memory, to which a rollback goes back."""

import torch


class SnapshotBuffer:
    """States of what this rank holds, put back bit for bit on every layout, nothing sent: the
    model's parameters (local parts; none where ZeRO-3 has freed them), the optimizer's (shards,
    owners' wholes, offloaded ones), its state, what its groups count, and `kept`; not what compress
    and diloco_every keep beside. Bytes of host memory: capacity x (weights + state here), in
    float32 AdamW 12 a parameter. They are not in checkpoints."""

    def __init__(self, capacity: int, every: int, model, optimizer, kept=()):
        # Oldest first
        self.capacity, self.every, self.kept, self.states = capacity, every, kept, []
        self.model, self.optimizer = model, optimizer

    @torch.no_grad()
    def snapshot(self, step: int, more=None) -> None:
        if self.states and (step % self.every or step <= self.states[-1][0]):
            return
        # First, so that there never is one more
        del self.states[: len(self.states) - self.capacity + 1]
        held, groups = {}, self.optimizer.param_groups
        for p in [*self.model.parameters(), *(p for g in groups for p in g["params"])]:
            if (x := local(p)).untyped_storage().nbytes():
                held.setdefault((x.data_ptr(), x.shape), (p, x.to("cpu", copy=True)))
        state = {
            p: {k: x.to("cpu", copy=True) if torch.is_tensor(x) else x for k, x in named.items()}
            for p, named in self.optimizer.state.items()
        }
        counts = [{k: x for k, x in g.items() if k not in ("params", "names")} for g in groups]
        self.states.append(
            (step, more, [*held.values()], state, counts, [part.tree() for part in self.kept])
        )

    @torch.no_grad()
    def restore(self, before: int, back: int = 1) -> tuple:
        """The back-th newest state older than `before`, or the oldest there is: (step, what came
        with it)."""
        older = sum(state[0] < before for state in self.states)
        del self.states[max(older - back, 0) + 1 :]
        step, more, held, state, counts, trees = self.states[-1]
        for p, x in held:
            local(p).copy_(x)
        now = self.optimizer.state
        for p in now.keys() - state.keys():
            del now[p]
        for p, named in state.items():
            for k, x in named.items():
                # Its memory may be a file
                now[p][k] = now[p][k].copy_(x) if torch.is_tensor(x) else x
        for group, counted in zip(self.optimizer.param_groups, counts):
            group.update(counted)
        for part, tree in zip(self.kept, trees):
            part.load(tree)
        return step, more


def local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if hasattr(p, "placements") else p.detach()
