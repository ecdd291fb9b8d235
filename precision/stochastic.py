"""bf16 weights without a float32 copy: each step is rounded up or down by chance, right on average.

                        before               during the step, 64 MiB at a time               after
    weights    bf16     p        ──────►     float32(p)  ─┐                          ┌────►   p
    gradients  bf16     g        ──────►     float32(g)  ─┤  any optimizer  ─► w ────┘        g
    state      float32  m, v     ───────────────────────  ┘                  rounded          m, v

bf16 keeps 8 significant bits: between 1 and 2 its numbers are 2^-7 apart, and rounded to nearest,
an update of less than 2^-8 is lost, this step and every other. A w between its neighbours a < b
becomes

    b with probability (w - a) / (b - a),   a otherwise:       the expectation is w

so a hundred updates of a hundredth of the gap move the weight by one gap, give or take. It costs
noise of at most half a gap (standard deviation) an element and step, and saves the 4 bytes a
parameter of a float32 copy.

In bits: a bf16 number is the upper half of a float32. Add 16 random bits to the lower half and cut
it off: the carry is the rounding. The sign is apart in both formats, so negative numbers need
nothing of their own. Numbers beyond the largest bf16 become that and not infinite; infinities and
NaN stay what they are.

The bits are a hash of (seed, step, full name, index of the element in the full parameter), nothing
is drawn: replicas that step the same weights, a rank with a shard and its resumed run all round
alike. Nothing is sent.

It does not mend what is rounded before: gradients have their parameter's dtype, and summing
micro-batches or ranks in bf16 rounds to nearest.

Gupta et al. 2015 (1502.02551); for bf16 training Zamirai et al. 2020 (2010.06192).

Fits every torch optimizer whose update of a parameter looks at no other; Muon, which multiplies
matrices of one shape together, gets smaller stacks. Parameters in other dtypes are stepped as they
are. State has the dtype the optimizer gives float32 weights. Schedule-Free: its step() is rounded
like any, with z in float32. eval() and train() round to nearest and keep what that takes away until
the next step, so the bits come back.

Used with: schedulers made before or after, late groups, hooks, deepcopy, pickle, GradScaler,
autocast and torch.compile around the step, DDP, torch.distributed.checkpoint; FSDP2 through
parallel/sharded_optimizer.py. memory/offload.py may be wrapped around it, not the other way round:
a step() that something else has replaced is refused, as are DTensors and groups without names.
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
    own = vars(optimizer).get("step")
    scheduled = hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is cls.step
    if not (own is None or scheduled) or hasattr(cls, "rounds"):
        raise ValueError(
            "something has replaced this optimizer's step(), which stochastic rounding "
            "would undo; call stochastic() once, and before offload()"
        )
    vars(optimizer).pop("step", None)  # a scheduler's wrapper: rounding()'s step() does the same
    for group in optimizer.param_groups:
        group.setdefault("sr_step", 0)
    optimizer.__class__ = rounding(cls, seed, shards or {}, chunk_mb)
    optimizer.full_names = full_names(optimizer.param_groups)
    for p, state in optimizer.state.items():
        state.update({name: x.float() for name, x in state.items() if half(p) and half(x)})
    return optimizer


def rounding(cls: type[Optimizer], seed: int, shards: dict[str, tuple], chunk_mb: float) -> type:
    """cls with a step() that rounds."""
    plain_step = cls.step.__wrapped__  # torch wraps step() in what runs the hooks; a chunk must not

    @torch.no_grad()
    def step(self, closure=None):
        self._opt_called = True  # schedulers look at it
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        groups, state, parts = self.param_groups, self.state, []
        try:
            for chunk in chunks(groups, chunk_mb * 2**20):
                works = {p: stand_in(p) for ps in chunk for p in ps}
                parts.append(
                    [{**g, "params": [works[p] for p in ps]} for g, ps in zip(groups, chunk)]
                )
                self.param_groups = parts[-1]
                self.state = defaultdict(
                    dict, {w: state[p] for p, w in works.items() if p in state}
                )
                plain_step(self)
                for group, ps in zip(groups, chunk):
                    for p in ps:
                        if works[p] in self.state:
                            state[p] = self.state[works[p]]
                        if works[p] is not p:
                            name = self.full_names[p]
                            full, offsets = shards.get(name, (p.shape, (0,) * p.ndim))
                            index = element_index(p.shape, full, offsets, p.device)
                            bits = random_bits(seed, group["sr_step"], name, index)
                            p.copy_(round_to_bf16(works[p].detach(), bits))
        finally:
            self.param_groups, self.state = groups, state
        for group, *seen in zip(groups, *parts):
            count(group, seen)
            group["sr_step"] += 1
        return loss

    def add_param_group(self, param_group: dict) -> None:
        params = param_group["params"]
        params = params if isinstance(params, (Tensor, set)) else list(params)
        group = {**param_group, "params": params, "sr_step": 0}
        check(group)
        cls.add_param_group(self, group)
        self.full_names |= full_names(self.param_groups[-1:])

    def load_state_dict(self, state_dict: dict) -> None:
        load_in_float32(self, cls, state_dict)

    def __reduce_ex__(self, protocol):
        return made_again, (cls, seed, shards, chunk_mb), self.__getstate__()

    def __setstate__(self, state: dict) -> None:
        cls.__setstate__(self, state)
        if not hasattr(self, "full_names"):  # a copy; load_state_dict may see a part of them
            self.full_names = full_names(self.param_groups)

    methods = {
        "step": Optimizer.profile_hook_step(step),
        "load_state_dict": load_state_dict,
        "add_param_group": add_param_group,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "rounds": True,
    }
    methods["step"].hooked = True  # so that torch does not wrap it once more
    methods["step"]._wrapped_by_lr_sched = True  # nor does a scheduler
    return type(cls.__name__, (cls,), methods)


def load_in_float32(optimizer: Optimizer, cls: type[Optimizer], state_dict: dict) -> None:
    """cls.load_state_dict in float32, where torch casts. What an older state lacks stays as it
    is."""
    given = {}

    def complete(_, saved):  # runs after the user's hooks
        given.update(saved)
        if len(saved["param_groups"]) == len(optimizer.param_groups):  # torch refuses the others
            pairs = zip(optimizer.param_groups, saved["param_groups"])
            given["param_groups"] = [{**mine, **theirs} for mine, theirs in pairs]
        return given

    def keep_precision(_):  # runs before the user's hooks
        ids = [i for group in given["param_groups"] for i in group["params"]]
        for i, p in zip(ids, [p for group in optimizer.param_groups for p in group["params"]]):
            for name, x in given["state"].get(i, {}).items():
                # None: cls has read another method's state
                now = optimizer.state.get(p, {}).get(name)
                if half(p) and half(now):
                    optimizer.state[p][name] = x.to(p.device, torch.float32, copy=True)
                elif now is x and torch.is_tensor(x):  # torch would step what was given
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
    """What deepcopy and pickle begin with."""
    cls = rounding(*arguments)
    return cls.__new__(cls)


def check(group: dict) -> None:
    """Raises ValueError."""
    params = [group["params"]] if torch.is_tensor(group["params"]) else group["params"]
    if len(group.get("names", ())) != len(params):
        raise ValueError(
            "stochastic rounding needs the full `names` of each group's parameters, in "
            "their order; optim/param_groups.py makes such groups"
        )
    if any(hasattr(p, "placements") and half(p) for p in params):
        raise ValueError(
            "stochastic rounding takes no DTensors; wrap the `optimizer` of an Adapter "
            "(parallel/sharded_optimizer.py), which has their shards, with its `shards`"
        )


def full_names(groups: list[dict]) -> dict[Tensor, str]:
    return {p: name for group in groups for p, name in zip(group["params"], group["names"])}


def half(x) -> bool:
    return torch.is_tensor(x) and x.dtype == torch.bfloat16


def count(group: dict, parts: list[dict]) -> None:
    """What the chunks changed in their copies of the group; of different numbers the largest
    holds."""
    new = {}
    for part in parts:
        for name, x in part.items():
            if name != "params" and x is not group.get(name):
                new[name] = max(x, new.get(name, x)) if isinstance(x, (int, float)) else x
    group.update(new)


def chunks(groups: list[dict], chunk_bytes: float) -> list[list[list[Tensor]]]:
    """For each chunk the parameters it takes of each group; one chunk if there are none."""
    made, size = [], math.inf
    for i, p in ((i, p) for i, group in enumerate(groups) for p in group["params"]):
        if size + p.nbytes > chunk_bytes:
            made.append([[] for _ in groups])
            size = 0
        made[-1][i].append(p)
        size += p.nbytes
    return made or [[[] for _ in groups]]


def stand_in(p: Tensor) -> Tensor:
    """What the optimizer steps in place of p: a float32 copy with a float32 gradient, or p where
    there is nothing to round."""
    if p.dtype != torch.bfloat16 or p.grad is None:
        return p
    work = nn.Parameter(p.detach().float(), p.requires_grad)
    work.grad = p.grad.float()
    return work


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bf16: x rounded away from 0 if the half of it that is cut off, plus `bits` (int32,
    each of 0 ... 65535 as likely), is 65536 or more."""
    carried = x.clamp(-LARGEST, LARGEST).view(torch.int32) + bits
    rounded = (carried >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


def element_index(shape, full, offsets, device: torch.device) -> Tensor:
    """int32 (shape): where each element of this shard lies in the full parameter, row by row;
    modulo 2^32."""
    index, stride = torch.zeros(tuple(shape), dtype=torch.int32, device=device), 1
    for dim in reversed(range(len(shape))):
        along = (torch.arange(shape[dim], device=device) + offsets[dim]) * stride
        index += along.to(torch.int32).view(-1, *[1] * (len(shape) - 1 - dim))
        stride *= full[dim]
    return index


def random_bits(seed: int, step: int, name: str, index: Tensor) -> Tensor:
    """16 random bits for each index, as int32 (a multiply-and-shift hash, keyed twice by
    sha256)."""
    digest = hashlib.sha256(f"{seed}:stochastic:{step}:{name}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
    h = index * -0x61C88647  # odd, of the golden ratio; products wrap at 32 bits
    for key in keys:
        h += key
        h = (h ^ (h >> 16 & 0xFFFF)).mul_(0x45D9F3B)
    return h >> 16 & 0xFFFF
