"""bf16 weights without a float32 copy: chance rounds each step up or down, right on average.

                        before               during the step, 64 MiB at a time               after
    weights    bf16     p        ──────►     float32(p)  ─┐                          ┌────►   p
    gradients  bf16     g        ──────►     float32(g)  ─┤  any optimizer  ─► w ────┘        g
    state      float32  m, v     ───────────────────────  ┘                  rounded          m, v

bf16 keeps 8 significant bits: between 1 and 2 its numbers are 2^-7 apart. With rounding to nearest,
an update of less than 2^-8 is lost, in this step and every other. Here a w between its neighbours
a < b becomes

    b with probability (w - a) / (b - a),   a otherwise:       the expectation is w

so a hundred updates of a hundredth of the gap move the weight by about one gap. This adds noise of
at most half a gap (standard deviation) an element and step, and saves the 4 bytes a parameter of a
float32 copy.

In bits: a bf16 number is the upper half of a float32. Add 16 random bits to the lower half and cut
it off: the carry is the rounding. Both formats keep the sign in a bit of its own, so negative
numbers need no other treatment. Numbers beyond the largest bf16 become the largest, not infinite;
infinities and NaN stay what they are.

The bits are a hash of (seed, step, full name, index of the element in the full parameter); nothing
is drawn. So replicas that step the same weights, a rank with a shard, and a resumed run all round
alike. Nothing is sent.

Rounding that happens before the step stays as it is: gradients have their parameter's dtype, and
summing micro-batches or ranks in bf16 rounds to nearest.

Gupta et al. 2015 (1502.02551); for bf16 training Zamirai et al. 2020 (2010.06192).

Fits every torch optimizer that updates a parameter without seeing the others; Muon, which
multiplies matrices of one shape together, gets smaller stacks. Parameters in other dtypes are
stepped as they are. State has the dtype that the optimizer gives it for float32 weights. For
Schedule-Free step() is rounded likewise, with z in float32. eval() and train() round to nearest and
keep what that takes away until the next step, so the bits come back.

Used with: schedulers made before or after, late groups, hooks, deepcopy, pickle, GradScaler,
autocast and torch.compile around the step, DDP, torch.distributed.checkpoint; FSDP2 through
parallel/sharded_optimizer.py. memory/offload.py may be wrapped around it, not the other way round.
Refused: a step() that something else has replaced, DTensors, and groups without names.

Example:
    import torch
    from precision.stochastic import stochastic
    p = torch.nn.Parameter(torch.ones(10000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([{"params": [p], "names": ["p"]}], lr=2**-10)
    optimizer = stochastic(optimizer, seed=0)
    for _ in range(64):  # to nearest, each of these steps would be lost
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert abs(p.double().mean() - (1 - 64 * 2**-10)) < 0.001
"""

import hashlib
import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LARGEST = torch.finfo(torch.bfloat16).max


def stochastic(
    optimizer: Optimizer, seed: int, shards: dict[str, tuple] | None = None, chunk_mb: float = 64.0
) -> Optimizer:
    """The same optimizer, whose step() from now on rounds its bf16 parameters stochastically.

    Its groups need full `names`, later ones too. shards: name -> (global shape, offsets)
    of parameters that are shards of a full one. chunk_mb: MiB of bf16 parameters that have float32
    copies at a time, with their gradients 4 times as much memory. Each group counts its steps as
    `sr_step`, which state_dict() keeps. Raises ValueError for groups without names, for DTensors,
    and where step() is no longer the class's own.
    """
    cls = type(optimizer)
    for group in optimizer.param_groups:
        check(group)
    # A scheduler made before has wrapped step(), to note that it ran. The step() of `rounding`
    # notes that itself, so this wrapper may go.
    own_step = vars(optimizer).get("step")
    by_scheduler = hasattr(own_step, "_wrapped_by_lr_sched") and own_step.__wrapped__ is cls.step
    is_replaced = own_step is not None and not by_scheduler
    if is_replaced or hasattr(cls, "rounds"):
        raise ValueError(
            "something has replaced this optimizer's step(), which stochastic rounding "
            "would undo; call stochastic() once, and before offload()"
        )
    vars(optimizer).pop("step", None)
    for group in optimizer.param_groups:
        group.setdefault("sr_step", 0)
    # The object stays the same, so schedulers and hooks that hold it keep working.
    optimizer.__class__ = rounding(cls, seed, shards or {}, chunk_mb)
    optimizer.full_names = full_names(optimizer.param_groups)
    # From now on the optimizer sees float32 weights, so bf16 state from before becomes float32.
    for p, state in optimizer.state.items():
        if is_bf16(p):
            state.update({name: x.float() for name, x in state.items() if is_bf16(x)})
    return optimizer


def rounding(cls: type[Optimizer], seed: int, shards: dict[str, tuple], chunk_mb: float) -> type:
    """A subclass of cls with a step() that rounds."""
    # torch wraps step() in a function that runs the hooks. A step runs them once, not each chunk.
    plain_step = cls.step.__wrapped__

    @torch.no_grad()
    def step(self, closure=None):
        self._opt_called = True  # schedulers warn without it
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        chunk_groups = []  # the groups as cls saw them, a list for each chunk
        state = self.state
        try:
            for chunk in chunks(groups, chunk_mb * 2**20):
                # cls steps float32 copies of this chunk's parameters in place of the parameters.
                works = {p: stand_in(p) for ps in chunk for p in ps}
                self.param_groups = [
                    {**group, "params": [works[p] for p in ps]} for group, ps in zip(groups, chunk)
                ]
                chunk_groups.append(self.param_groups)
                known = {work: state[p] for p, work in works.items() if p in state}
                self.state = defaultdict(dict, known)
                plain_step(self)

                # State goes back as it is, in float32. Only weights are rounded.
                for p, work in works.items():
                    if work in self.state:
                        state[p] = self.state[work]
                for group, ps in zip(groups, chunk):
                    for p in ps:
                        if works[p] is not p:
                            name = self.full_names[p]
                            shard = shards.get(name, (p.shape, (0,) * p.ndim))
                            round_into(p, works[p], name, shard, seed, group["sr_step"])
        finally:
            self.param_groups = groups
            self.state = state
        for group, *copies in zip(groups, *chunk_groups):
            merge_counts(group, copies)
            group["sr_step"] += 1
        return loss

    def add_param_group(self, param_group: dict) -> None:
        params = param_group["params"]
        # check() and torch both read these: a generator would be empty the second time.
        if not isinstance(params, (Tensor, set)):
            params = list(params)
        group = {**param_group, "params": params, "sr_step": 0}
        check(group)
        cls.add_param_group(self, group)
        self.full_names |= full_names(self.param_groups[-1:])

    def load_state_dict(self, state_dict: dict) -> None:
        load_in_float32(self, cls, state_dict)

    def __reduce_ex__(self, protocol):
        # A class made in a function cannot be pickled by name: make it again from its arguments.
        return made_again, (cls, seed, shards, chunk_mb), self.__getstate__()

    def __setstate__(self, state: dict) -> None:
        cls.__setstate__(self, state)
        # Copies and unpickled optimizers lack them. load_state_dict() comes here too, with names.
        if not hasattr(self, "full_names"):
            self.full_names = full_names(self.param_groups)

    methods = {
        "step": Optimizer.profile_hook_step(step),
        "load_state_dict": load_state_dict,
        "add_param_group": add_param_group,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "rounds": True,
    }
    # These marks keep torch and schedulers from wrapping this step() once more.
    methods["step"].hooked = True
    methods["step"]._wrapped_by_lr_sched = True
    return type(cls.__name__, (cls,), methods)


def round_into(p: Tensor, work: Tensor, name: str, shard: tuple, seed: int, step: int) -> None:
    """p becomes `work`, rounded by bits of each element's place in the full parameter.

    shard: (global shape, offsets) of p in the full parameter of this name.
    """
    index = element_index(p.shape, *shard, p.device)
    bits = random_bits(seed, step, name, index)
    p.copy_(round_to_bf16(work.detach(), bits))


def load_in_float32(optimizer: Optimizer, cls: type[Optimizer], state_dict: dict) -> None:
    """cls.load_state_dict, which casts to the parameters' dtype, but in float32.

    What an older state does not say stays as it is.
    """
    given = {}

    def complete(_, saved):
        """Fills in what the saved groups do not say. Runs after the user's hooks."""
        given.update(saved)
        # torch refuses another number of groups, with a better message.
        if len(saved["param_groups"]) == len(optimizer.param_groups):
            pairs = zip(optimizer.param_groups, saved["param_groups"])
            given["param_groups"] = [{**mine, **theirs} for mine, theirs in pairs]
        return given

    def keep_precision(_):
        """Takes float32 state from what was given. Runs before the user's hooks."""
        ids = [i for group in given["param_groups"] for i in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in zip(ids, params):
            for name, x in given["state"].get(i, {}).items():
                # None where cls reads another method's state and dropped this entry.
                now = optimizer.state.get(p, {}).get(name)
                if is_bf16(p) and is_bf16(now):
                    optimizer.state[p][name] = x.to(p.device, torch.float32, copy=True)
                elif now is x and torch.is_tensor(x):
                    # Without a copy, steps would change what the user gave.
                    optimizer.state[p][name] = x.clone()

    hooks = (
        optimizer.register_load_state_dict_pre_hook(complete),
        optimizer.register_load_state_dict_post_hook(keep_precision, prepend=True),
    )
    try:
        cls.load_state_dict(optimizer, state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def made_again(*arguments) -> Optimizer:
    """What deepcopy and pickle begin with: an empty object of the class."""
    cls = rounding(*arguments)
    return cls.__new__(cls)


# ---- groups --------------------------------------------------------------------------------------
def check(group: dict) -> None:
    """Raises ValueError for a group without names, or with DTensors."""
    params = group["params"]
    if torch.is_tensor(params):
        params = [params]
    if len(group.get("names", ())) != len(params):
        raise ValueError(
            "stochastic rounding needs the full `names` of each group's parameters, in "
            "their order; optim/param_groups.py makes such groups"
        )
    if any(hasattr(p, "placements") and is_bf16(p) for p in params):
        raise ValueError(
            "stochastic rounding takes no DTensors; wrap the `optimizer` of an Adapter "
            "(parallel/sharded_optimizer.py), which has their shards, with its `shards`"
        )


def full_names(groups: list[dict]) -> dict[Tensor, str]:
    return {p: name for group in groups for p, name in zip(group["params"], group["names"])}


def is_bf16(x) -> bool:
    return torch.is_tensor(x) and x.dtype == torch.bfloat16


def merge_counts(group: dict, copies: list[dict]) -> None:
    """Takes into the group what cls changed in the chunks' copies; the largest of several numbers.

    Some optimizers count in their groups, as Schedule-Free counts its steps.
    """
    new = {}
    for copy in copies:
        for name, x in copy.items():
            if name == "params" or x is group.get(name):
                continue
            if isinstance(x, (int, float)):
                x = max(x, new.get(name, x))
            new[name] = x
    group.update(new)


def chunks(groups: list[dict], chunk_bytes: float) -> list[list[list[Tensor]]]:
    """For each chunk the parameters it takes of each group; one empty chunk if there are none."""
    made = []
    size = math.inf  # of the last chunk, in bytes: the first parameter opens a new one
    for i, group in enumerate(groups):
        for p in group["params"]:
            if size + p.nbytes > chunk_bytes:
                made.append([[] for _ in groups])
                size = 0
            made[-1][i].append(p)
            size += p.nbytes
    return made or [[[] for _ in groups]]


# ---- rounding ------------------------------------------------------------------------------------
def stand_in(p: Tensor) -> Tensor:
    """What the optimizer steps in place of p: a float32 copy with a float32 gradient.

    It is p itself where there is nothing to round.
    """
    if p.dtype != torch.bfloat16 or p.grad is None:
        return p
    work = nn.Parameter(p.detach().float(), p.requires_grad)
    work.grad = p.grad.float()
    return work


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bf16, rounded away from 0 where the carry of x's lower half says so.

    bits: int32, each of 0 ... 65535 as likely. Lower half + bits of 65536 or more is the carry.
    """
    carried = x.clamp(-LARGEST, LARGEST).view(torch.int32) + bits
    rounded = (carried >> 16).to(torch.int16).view(torch.bfloat16)
    # Clamping has made infinities finite, and a carry may break NaN: take both from x.
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


def element_index(shape, full_shape, offsets, device: torch.device) -> Tensor:
    """int32 (shape): where each element of this shard lies in the full parameter, row-major.

    Modulo 2^32: a hash does not mind.
    """
    index = torch.zeros(tuple(shape), dtype=torch.int32, device=device)
    stride = 1
    for dim in reversed(range(len(shape))):
        along = (torch.arange(shape[dim], device=device) + offsets[dim]) * stride
        index += along.to(torch.int32).view(-1, *[1] * (len(shape) - 1 - dim))
        stride *= full_shape[dim]
    return index


def random_bits(seed: int, step: int, name: str, index: Tensor) -> Tensor:
    """16 random bits for each index, as int32: a multiply-and-shift hash, keyed twice by sha256."""
    digest = hashlib.sha256(f"{seed}:stochastic:{step}:{name}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
    # 2^32 / golden ratio, as an int32: an odd factor that takes neighbouring indices far apart.
    # int32 products wrap.
    hashed = index * -0x61C88647
    for key in keys:
        hashed += key
        # The mask makes >> a logical shift: in int32 it would repeat the sign bit.
        hashed = (hashed ^ (hashed >> 16 & 0xFFFF)).mul_(0x45D9F3B)
    return hashed >> 16 & 0xFFFF


if __name__ == "__main__":
    x = torch.full((10000,), 1.001)
    rounded = round_to_bf16(x, random_bits(0, 0, "x", torch.arange(10000, dtype=torch.int32)))
    print(f"1.001 as bf16: {x[0].bfloat16():g} to nearest, by chance {rounded.double().mean():.4f}")
