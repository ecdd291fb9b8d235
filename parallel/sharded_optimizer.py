"""Any torch optimizer on a model of DTensors (fully_shard), under everybody else's tools.

    fully_shard(model)
    optimizer = make_optimizer(torch.optim.Adafactor, model.parameters(), lr=0.02)
    loss.backward(), optimizer.step(), optimizer.zero_grad()

                     outside: what tools see                     inside: what the method steps
    groups, state    the model's DTensors, in state_dict() too   plain shards, or whole at owners
    who looks        clipping, GradScaler, schedulers, hooks,    the method's own step(), eval() ...
                     torch.distributed.checkpoint

parallel/adapter.py is the inside, and says what is sent; the outside adds a byte for each parameter
and step:

  - A gradient missing on some ranks counts as zero there; one missing on all ranks is None, and its
    weight, state and decay stay untouched.
  - Weights that something else changed (a checkpoint loaded, an average copied in) are seen at the
    next step; for that, methods with owners keep a copy of the shards.

A class that does not say whether it is `elementwise` gets owners, which is always right; with
make_optimizer(torch.optim.AdamW, model.parameters(), elementwise=True) its shards stay where they
are.

Used with named_parameters(), late groups, step(closure), load hooks; state_dict() gives DTensors of
each weight's placements, load_state_dict() takes them from any layout, or full tensors. Refused
when made: methods that couple parameters, a plain tensor among DTensors. Refused when tried:
deepcopy and pickle, as process groups cannot be copied. Said: Schedule-Free's eval(), after which
fully_shard has to reshard. See docs/partners.md. Neighbours: parallel/adapter.py,
parallel/owners.py, parallel/shard.py.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.adapter import Adapter
from parallel.shard import local, shard_of

__all__ = ["Adapter", "make_optimizer"]


def make_optimizer(
    cls: type[Optimizer], groups, elementwise: bool | None = None, **arguments
) -> Optimizer:
    """cls(groups, **arguments) for DTensors: an instance of a subclass of cls, whose param_groups
    hold them.

    groups: whatever torch's optimizers take, named parameters too; elementwise: see Adapter. Plain
    tensors alone give cls itself. Collective, as are step(), state_dict() and load_state_dict(),
    which takes the state of any layout. Raises ValueError for a plain tensor among DTensors and a
    method that couples parameters.
    """
    if torch.is_tensor(groups):  # a mistake, of which torch tells
        return cls(groups, **arguments)
    groups = [{**g, "params": listed(g["params"])} if isinstance(g, dict) else g for g in groups]
    flat = [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
    if not any(hasattr(p[1] if isinstance(p, tuple) else p, "placements") for p in flat):
        return cls(groups, **arguments)
    own = [
        n
        for n in dir(cls)
        if not n.startswith("_") and not hasattr(Optimizer, n) and callable(getattr(cls, n))
    ]
    made = type(cls.__name__, (Sharded, cls), {name: forwarded(name) for name in own})
    return made(cls, groups, elementwise, arguments)


def listed(params) -> list:
    """A group's parameters: a generator is read once."""
    return [params] if torch.is_tensor(params) else list(params)


def forwarded(name: str):
    """A method that torch's optimizers do not have, such as Schedule-Free's eval(), on the plain
    tensors."""

    def method(self, *args, **kwargs):
        if name == "eval" and self.warned is False:
            self.warned = True
            warnings.warn(
                "fully_shard keeps weights that were gathered for a forward without backward: after"
                " evaluating call reshard() on its modules, and then train()",
                stacklevel=2,
            )
        self.adapter.look()
        self.give_options()
        result = getattr(self.inner, name)(*args, **kwargs)
        self.adapter.broadcast_weights()
        self.take_options()
        return result

    return method


class Sharded:
    """The outside of an Adapter, mixed into the method's class: groups and state by the model's
    weights.

    `inner` steps the plain tensors; before it does it gets what the groups say, and afterwards they
    get what it counted.
    """

    # GradScaler unscales by itself, whatever kernel steps inside
    _step_supports_amp_scaling = False

    def __init__(self, cls: type[Optimizer], groups, elementwise: bool | None, arguments: dict):
        self.shown, self.begun, self.warned = None, False, False
        Optimizer.__init__(self, groups, {})  # torch's own forms, names and checks
        self.try_whole = lambda groups: cls([on_meta(group) for group in groups], **arguments)
        self.try_whole(self.param_groups)  # a bad group is one on every rank, whoever will step it
        self.adapter = Adapter(cls, self.param_groups, elementwise, agree=True, **arguments)
        self.inner = self.adapter.optimizer
        self.defaults = self.inner.defaults
        self.take_options()

    def add_param_group(self, group: dict) -> None:
        group = {**group, "params": listed(group["params"])}
        for p in (p[1] if isinstance(p, tuple) else p for p in group["params"]):
            if torch.is_tensor(p) and not hasattr(p, "placements"):
                raise ValueError(
                    f"a plain tensor of shape {tuple(p.shape)} among DTensors: fully_shard leaves "
                    "weights gathered after a forward without backward, so call reshard() on its "
                    "modules first; weights meant to be plain need an optimizer of their own"
                )
        Optimizer.add_param_group(self, group)
        if "inner" in self.__dict__:
            self.give_options()  # or what was set since the last step would be taken back
            try:
                self.try_whole(self.param_groups[-1:])
                self.inner.add_param_group(*self.adapter.hold(self.param_groups[-1:]))
            except Exception:
                self.param_groups.pop()
                raise
            self.take_options()

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.give_options()
        self.inner.step()
        self.take_options()
        self.begun = True
        return loss

    # ---- what the groups say ---------------------------------------------------------------------
    def give_options(self) -> None:
        copy_options(self.param_groups, self.inner.param_groups)

    def take_options(self) -> None:
        copy_options(self.inner.param_groups, self.param_groups)

    @property
    def sent_bytes(self) -> int:
        """By this rank in each step."""
        return self.adapter.sent_bytes

    def __getattr__(self, name: str):  # what the method's own constructor set
        if name in ("inner", "adapter"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "make_optimizer's optimizer holds process groups, which cannot be copied or pickled; "
            "copy or save its state_dict(), on all ranks together"
        )

    # ---- state by the model's weights ------------------------------------------------------------
    @property
    def state(self) -> dict:
        """By weight the state on this rank, {} where it is elsewhere; in state_dict() all of it, as
        DTensors. Empty before the first step, on all ranks."""
        if self.shown is not None:
            return self.shown
        kept, stepped = self.inner.state, self.adapter.stepped
        params = [p for group in self.param_groups for p in group["params"]] if self.begun else []
        return {p: kept.get(stepped.get(p), {}) for p in params}

    @state.setter
    def state(self, _) -> None:
        """torch's constructor and load_state_dict() set it; it is `inner` that keeps it."""

    def state_dict(self) -> dict:
        """As torch's, collective: a tensor of its weight's shape is a DTensor like it, others are
        full."""
        self.give_options()
        self.shown = self.full_state()
        try:
            return Optimizer.state_dict(self)
        finally:
            self.shown = None

    @torch.no_grad()
    def full_state(self) -> dict:
        here = {p: state for p, state in self.state.items() if state}
        found = dict(here)
        for group, wire, params in self.adapter.spread.values():
            # By rank, what it has of each weight: shapes and dtypes of tensors, and all else as it
            # is.
            lists = [None] * dist.get_world_size(group)
            mine = {
                i: {
                    name: (tuple(x.shape), x.dtype) if torch.is_tensor(x) else (None, x)
                    for name, x in here[p].items()
                }
                for i, p in enumerate(params)
                if p in here
            }
            dist.all_gather_object(lists, mine, group)
            for i, p in enumerate(params):
                first = next((rank for rank, listed in enumerate(lists) if i in listed), None)
                if first is None:
                    continue
                found[p] = {}
                for name, (shape, x) in lists[first][i].items():
                    if shape is not None:
                        x = self.seen_from_outside(
                            p, here.get(p, {}).get(name), shape, x, first, group, wire
                        )
                    found[p][name] = x
        # One order on all ranks: whoever gathers DTensors goes through them together.
        return {p: found[p] for group in self.param_groups for p in group["params"] if p in found}

    def seen_from_outside(self, p, x, shape, dtype, first, group, wire) -> Tensor:
        """A tensor of p's state of which this rank has x, or None; rank `first` of the group has
        it."""
        if self.is_owned(p):
            x = (
                torch.empty(shape, dtype=dtype, device=wire)
                if x is None
                else x.to(wire).contiguous()
            )
            dist.broadcast(x, group=group, group_src=first)
            if shape != tuple(p.shape):
                return x
            x = shard_of(p).narrow(x, local(p).shape).clone()
        elif x is None:  # no element of p is here
            x = torch.empty_like(local(p), dtype=dtype)
        if x.shape != local(p).shape:  # a count
            return x
        return like(p, x)

    def is_owned(self, p: Tensor) -> bool:
        return any(p is q for exchange in self.adapter.exchanges for q in exchange.params)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, collective: takes the state of any layout, in DTensors or full tensors."""

        def load_inner(_, saved: dict) -> dict:  # runs after the pre-hooks of others
            sizes, own = (
                [len(group["params"]) for group in groups]
                for groups in (saved["param_groups"], self.param_groups)
            )
            if sizes == own:  # or torch says what is wrong
                self.inner.load_state_dict(self.from_outside(saved))
                self.begun = bool(saved["state"])
            return saved | {"state": {}}

        last = self.register_load_state_dict_pre_hook(load_inner)
        first = self.register_load_state_dict_post_hook(lambda _: self.take_options(), prepend=True)
        try:
            Optimizer.load_state_dict(self, state_dict)
        finally:
            last.remove(), first.remove()

    @torch.no_grad()
    def from_outside(self, saved: dict) -> dict:
        """What the optimizer on plain tensors loads of a saved state, in its numbers."""
        new, numbers = self.inner.state_dict(), {}
        for group, numbered in zip(self.inner.param_groups, new["param_groups"]):
            numbers |= zip(group["params"], numbered["params"])
        copy_options(saved["param_groups"], new["param_groups"])
        new["state"] = {}
        for group, ours in zip(saved["param_groups"], self.param_groups):
            for i, p in zip(group["params"], ours["params"]):
                state = {
                    name: self.seen_from_inside(p, x)
                    for name, x in saved["state"].get(i, {}).items()
                }
                if state and p in self.adapter.stepped:
                    new["state"][numbers[self.adapter.stepped[p]]] = state
        return new

    def seen_from_inside(self, p: Tensor, x):
        """What this rank steps p with, of an entry x in a saved state of p."""
        owned = self.is_owned(p)
        if hasattr(x, "placements"):
            if not owned and (x.placements, x.device_mesh) == (p.placements, p.device_mesh):
                return x.to_local()
            x = x.full_tensor()
        if torch.is_tensor(x) and not owned and x.shape == p.shape:
            return shard_of(p).narrow(x, local(p).shape)
        return x


def on_meta(group: dict) -> dict:
    """The group with shapes in place of its weights."""
    params = [
        nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in group["params"]
    ]
    return {name: x for name, x in group.items() if name != "param_names"} | {"params": params}


def copy_options(source: list[dict], target: list[dict]) -> None:
    for given, group in zip(source, target):
        group.update(
            (name, x) for name, x in given.items() if name not in ("params", "names", "param_names")
        )


def like(p: Tensor, shard: Tensor) -> Tensor:
    """The DTensor that lies as p does, with this shard."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
