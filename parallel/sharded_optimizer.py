"""Any torch optimizer on a model of DTensors (fully_shard), under everybody else's tools.

                     outside: what tools see                     inside: what the method steps
    groups, state    the model's DTensors, in state_dict() too   plain shards, or full at owners
    users            clipping, GradScaler, schedulers, hooks,    the method's own step(), eval() ...
                     torch.distributed.checkpoint

parallel/adapter.py is the inside, and lists the bytes sent. The outside adds a byte for each
parameter and step:

  - A gradient missing on some ranks counts as zero there; one missing on all ranks is None, and its
    weight, state and decay stay untouched.
  - The next step sees weights that something else changed (a checkpoint loaded, an average copied
    in). For that, methods with owners keep a copy of the shards.

A class that does not declare `elementwise` gets owners, which is always right. Its shards stay in
place with make_optimizer(torch.optim.AdamW, model.parameters(), elementwise=True).

It takes named_parameters(), groups added later, step(closure) and load hooks. state_dict() gives
DTensors with each weight's placements; load_state_dict() takes them from any layout, and full
tensors too. Refused when made: methods that couple parameters, a plain tensor among DTensors.
Refused when tried: deepcopy and pickle, because process groups cannot be copied. A warning:
Schedule-Free's eval(), after which fully_shard has to reshard. See docs/partners.md.

Neighbours: parallel/adapter.py, parallel/owners.py, parallel/replicas.py, parallel/shard.py,
parallel/mesh.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from torch.distributed.fsdp import fully_shard
    from parallel.sharded_optimizer import make_optimizer

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        fully_shard(model)
        optimizer = make_optimizer(torch.optim.Adafactor, model.parameters(), lr=0.05)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 40)
        for step in range(40):
            x = torch.randn(32, 8)
            loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            first = loss.item() if step == 0 else first
        print(f"rank {rank}: loss {first:.3f} -> {loss:.3f}")
        assert loss < first / 2
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
import io
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.adapter import Adapter, listed
from parallel.shard import local, shard_of

__all__ = ["Adapter", "make_optimizer"]


def make_optimizer(
    cls: type[Optimizer], groups, elementwise: bool | None = None, **arguments
) -> Optimizer:
    """cls(groups, **arguments) for DTensors: a subclass of cls whose param_groups hold them.

    groups: whatever torch's optimizers take, named parameters too. elementwise: see Adapter. If all
    parameters are plain tensors, the result is cls itself.

    Collective, as are step(), state_dict() and load_state_dict(). Raises ValueError for a plain
    tensor among DTensors, and for a method that couples parameters.
    """
    if torch.is_tensor(groups):
        # A user's mistake, which torch explains.
        return cls(groups, **arguments)
    groups = [
        {**group, "params": listed(group["params"])} if isinstance(group, dict) else group
        for group in groups
    ]
    if not any(hasattr(p, "placements") for group in groups for p in tensors(group)):
        return cls(groups, **arguments)
    # Methods beyond torch's own, such as Schedule-Free's eval(), must reach the plain tensors.
    methods = {}
    for name in dir(cls):
        is_own = not name.startswith("_") and not hasattr(Optimizer, name)
        if is_own and callable(getattr(cls, name)):
            methods[name] = forwarded(name)
    made = type(cls.__name__, (Sharded, cls), methods)
    return made(cls, groups, elementwise, arguments)


def tensors(group) -> list:
    """The parameters of a group, or the one that is not in a group; each may come with its name."""
    items = group["params"] if isinstance(group, dict) else [group]
    return [item[1] if isinstance(item, tuple) else item for item in items]


def forwarded(name: str):
    """A method that runs the method's own one of this name, on the plain tensors."""

    def method(self, *args, **kwargs):
        if name == "eval" and self.warned is False:
            self.warned = True
            warnings.warn(
                "fully_shard keeps weights that were gathered for a forward without backward: after"
                " evaluating call reshard() on its modules, and then train()",
                stacklevel=2,
            )
        self.adapter.refresh()
        self.give_options()
        result = getattr(self.inner, name)(*args, **kwargs)
        self.adapter.broadcast_weights()
        self.take_options()
        return result

    return method


class Sharded:
    """The outside of an Adapter, mixed into the method's class.

    Its groups and state are keyed by the model's weights. `inner` is the method on plain tensors:
    before each step it gets the options of these groups, and afterwards these groups get the
    numbers it counted.
    """

    # GradScaler unscales by itself, whatever kernel steps inside.
    _step_supports_amp_scaling = False

    def __init__(self, cls: type[Optimizer], groups, elementwise: bool | None, arguments: dict):
        self.shown = None  # while state_dict() runs: the full state
        self.has_stepped = False
        self.warned = False
        # torch's own constructor knows all forms of groups, their names and their mistakes.
        Optimizer.__init__(self, groups, {})
        # A bad group must fail on every rank, also on ranks that will not step it.
        self.try_shapes = lambda groups: cls([on_meta(group) for group in groups], **arguments)
        self.try_shapes(self.param_groups)
        self.adapter = Adapter(cls, self.param_groups, elementwise, agree=True, **arguments)
        self.inner = self.adapter.optimizer
        self.defaults = self.inner.defaults
        self.take_options()

    def add_param_group(self, group: dict) -> None:
        """As in torch. Raises ValueError for a plain tensor among DTensors."""
        group = {**group, "params": listed(group["params"])}
        for p in tensors(group):
            if torch.is_tensor(p) and not hasattr(p, "placements"):
                raise ValueError(
                    f"a plain tensor of shape {tuple(p.shape)} among DTensors: fully_shard leaves "
                    "weights gathered after a forward without backward, so call reshard() on its "
                    "modules first; weights meant to be plain need an optimizer of their own"
                )
        Optimizer.add_param_group(self, group)
        # torch's constructor adds its groups through here, before there is an inside.
        if "inner" not in self.__dict__:
            return
        # First give: taking the options would undo what was set since the last step.
        self.give_options()
        try:
            self.try_shapes(self.param_groups[-1:])
            self.inner.add_param_group(*self.adapter.take_over(self.param_groups[-1:]))
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
        self.has_stepped = True
        return loss

    # ---- options: lr and all else that a group holds beside its parameters -----------------------
    def give_options(self) -> None:
        copy_options(self.param_groups, self.inner.param_groups)

    def take_options(self) -> None:
        copy_options(self.inner.param_groups, self.param_groups)

    @property
    def sent_bytes(self) -> int:
        """By this rank in each step."""
        return self.adapter.sent_bytes

    def __getattr__(self, name: str):
        # `inner` has the attributes that the method's own constructor has set. Before `inner` is
        # set, looking there for it would never end.
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
        """Weight -> its state on this rank, {} where another rank has it.

        Before the first step {} on all ranks; while state_dict() runs, the full state in DTensors.
        """
        if self.shown is not None:
            return self.shown
        if not self.has_stepped:
            return {}
        state = {}
        for group in self.param_groups:
            for p in group["params"]:
                state[p] = self.inner.state.get(self.adapter.stepped.get(p), {})
        return state

    @state.setter
    def state(self, _) -> None:
        """torch's constructor and load_state_dict() set it, but `inner` keeps the state."""

    def state_dict(self) -> dict:
        """As in torch, but collective. Tensors of a weight's shape are DTensors, others full."""
        self.give_options()
        self.shown = self.full_state()
        try:
            return Optimizer.state_dict(self)
        finally:
            self.shown = None

    @torch.no_grad()
    def full_state(self) -> dict:
        """Weight -> its state as seen from outside, the same keys on all ranks."""
        here = {p: state for p, state in self.state.items() if state}
        found = dict(here)
        for group, wire, params in self.adapter.sharded.values():
            # All ranks learn which state there is: tensors by shape and dtype, all else in full.
            # Of each weight one rank tells, and everybody knows who.
            of_rank = {}  # rank of the group -> numbers of the weights that it tells about
            for i, p in enumerate(params):
                of_rank.setdefault(self.adapter.knows_state(p, group), []).append(i)
            for first, numbers in sorted(of_rank.items()):
                mine = {i: outline(here[params[i]]) for i in numbers if params[i] in here}
                for i, of_weight in told(mine, first, group, wire).items():
                    p = params[i]
                    found[p] = {}
                    for name, (shape, x) in of_weight.items():
                        if shape is not None:
                            dtype = x
                            x = here.get(p, {}).get(name)
                            x = self.seen_from_outside(p, x, shape, dtype, first, group, wire)
                        found[p][name] = x
        # One order on all ranks: whoever gathers DTensors goes through them together.
        return {p: found[p] for group in self.param_groups for p in group["params"] if p in found}

    def seen_from_outside(self, p, x, shape, dtype, first, group, wire) -> Tensor:
        """A tensor of p's state, as a DTensor if it has a number for each element of p.

        x: what this rank has of it, or None. Rank `first` of the group has it, with `shape` and
        `dtype` as given here.
        """
        if self.is_owned(p):
            # State lies where the owner steps, on the CPU if offloaded; messages leave from `wire`.
            if x is None:
                x = torch.empty(shape, dtype=dtype, device=wire)
            else:
                x = x.to(wire).contiguous()
            dist.broadcast(x, group=group, group_src=first)
            if shape != tuple(p.shape):
                return x
            # Clone: a view would keep the full tensor in memory.
            x = shard_of(p).narrow(x, local(p).shape).clone()
        elif x is None:
            # This rank has no element of p.
            x = torch.empty_like(local(p), dtype=dtype)
        is_shard = x.shape == local(p).shape  # else a count, say
        return like(p, x) if is_shard else x

    def is_owned(self, p: Tensor) -> bool:
        return p in self.adapter.owners

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but collective. Takes any layout's state, in DTensors or full tensors."""

        def load_inner(_, saved: dict) -> dict:
            saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
            sizes = [len(group["params"]) for group in self.param_groups]
            # Where they differ, torch says what is wrong.
            if saved_sizes == sizes:
                self.inner.load_state_dict(self.from_outside(saved))
                self.has_stepped = bool(saved["state"])
            return saved | {"state": {}}

        # Registered last, load_inner runs after everybody else's pre-hooks.
        pre_hook = self.register_load_state_dict_pre_hook(load_inner)
        post_hook = self.register_load_state_dict_post_hook(
            lambda _: self.take_options(), prepend=True
        )
        try:
            Optimizer.load_state_dict(self, state_dict)
        finally:
            pre_hook.remove()
            post_hook.remove()

    @torch.no_grad()
    def from_outside(self, saved: dict) -> dict:
        """A saved state, as `inner` loads it: with its numbering, in the tensors it steps."""
        new = self.inner.state_dict()
        numbers = {}  # plain tensor -> its number in inner's state_dict
        for group, numbered in zip(self.inner.param_groups, new["param_groups"]):
            numbers |= zip(group["params"], numbered["params"])
        copy_options(saved["param_groups"], new["param_groups"])
        new["state"] = {}
        for group, ours in zip(saved["param_groups"], self.param_groups):
            for i, p in zip(group["params"], ours["params"]):
                # On every rank, for every weight: this may be a collective.
                entries = saved["state"].get(i, {})
                state = {name: self.seen_from_inside(p, x) for name, x in entries.items()}
                if state and p in self.adapter.stepped:
                    new["state"][numbers[self.adapter.stepped[p]]] = state
        return new

    def seen_from_inside(self, p: Tensor, x):
        """An entry x of p's saved state, as this rank steps p with it."""
        is_owned = self.is_owned(p)
        if hasattr(x, "placements"):
            same_layout = (x.placements, x.device_mesh) == (p.placements, p.device_mesh)
            if same_layout and not is_owned:
                return x.to_local()
            x = x.full_tensor()
        if torch.is_tensor(x) and not is_owned and x.shape == p.shape:
            return shard_of(p).narrow(x, local(p).shape)
        return x


def outline(state: dict) -> dict:
    """Name -> (shape, dtype) of a tensor, (None, x) of anything else."""
    return {
        name: (tuple(x.shape), x.dtype) if torch.is_tensor(x) else (None, x)
        for name, x in state.items()
    }


def told(value, first: int, group: dist.ProcessGroup, wire: torch.device):
    """What rank `first` of the group passes as `value`, on all its ranks. Collective.

    Raises TypeError, on all of them, for more than tensors, numbers, text and plain containers:
    nothing that a rank is told may run code.
    """
    data = torch.empty(0, dtype=torch.uint8, device=wire)
    if dist.get_rank(group) == first:
        file = io.BytesIO()
        try:
            torch.save((value, None), file)
        except Exception as error:
            # What cannot be pickled: the other ranks are waiting for a message.
            file = io.BytesIO()
            torch.save((None, str(error)), file)
        data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(wire)
    size = torch.tensor([data.numel()], device=wire)
    dist.broadcast(size, group=group, group_src=first)
    data.resize_(int(size))
    dist.broadcast(data, group=group, group_src=first)
    try:
        message = io.BytesIO(data.cpu().numpy().tobytes())
        value, why = torch.load(message, weights_only=True)
    except Exception as error:
        why = error
    if why is not None:
        raise TypeError(
            "the optimizer's state holds more than tensors, numbers, text and plain containers, "
            f"and ranks tell each other no more: {why}"
        )
    return value


def on_meta(group: dict) -> dict:
    """The group with weights that have a shape and no numbers."""
    result = {name: x for name, x in group.items() if name != "param_names"}
    result["params"] = [
        nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in group["params"]
    ]
    return result


def copy_options(source: list[dict], target: list[dict]) -> None:
    """Each group's lr and other options; the parameters and their names stay."""
    for given, group in zip(source, target):
        for name, x in given.items():
            if name not in ("params", "names", "param_names"):
                group[name] = x


def like(p: Tensor, shard: Tensor) -> Tensor:
    """A DTensor of p's layout with this shard."""
    from torch.distributed.tensor import DTensor

    # Without shape and stride torch infers them as if all shards were equally large.
    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
