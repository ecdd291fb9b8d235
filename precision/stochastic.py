"""bf16 weights without a float32 copy: each step's result is rounded up or down by chance, right on average.

                        before               during the step, 64 MiB at a time               after
    weights    bf16     p        ──────►     float32(p)  ─┐                          ┌────►   p
    gradients  bf16     g        ──────►     float32(g)  ─┤  any optimizer  ─► w ────┘        g
    state      float32  m, v     ───────────────────────  ┘                  rounded          m, v

bf16 keeps 8 significant bits: between 1 and 2 its numbers are 2^-7 apart, and rounded to nearest, an update
of less than 2^-8 is lost, this step and every other. A w between its neighbours a < b becomes

    b with probability (w - a) / (b - a),   a otherwise:       the expectation is w

so a hundred updates of a hundredth of the gap move the weight by one gap, give or take. It costs noise of at
most half a gap (standard deviation) an element and step, and saves the 4 bytes a parameter of a float32 copy.

In bits: a bf16 number is the upper half of a float32. Add 16 random bits to the lower half and cut it off:
the carry is the rounding. The sign is apart in both formats, so negative numbers need nothing of their own.
Numbers beyond the largest bf16 become that and not infinite; infinities and NaN stay what they are.

The bits are a hash of (seed, step, full name, index of the element in the whole parameter), nothing is drawn:
replicas that step the same weights, a rank with a shard and its resumed run all round alike. Nothing is sent.

It does not mend what is rounded before: gradients have their parameter's dtype, and summing micro-batches or
ranks in bf16 rounds to nearest.

Gupta et al. 2015 (1502.02551); for bf16 training Zamirai et al. 2020 (2010.06192).

Fits every torch optimizer whose update of a parameter looks at no other; Muon, which multiplies matrices of
one shape together, gets smaller stacks. memory/offload.py may be wrapped around it, not the other way round.
Parameters in other dtypes are stepped as they are. State has the dtype the optimizer gives float32 weights.
Schedule-Free: its step() is rounded like any, with z in float32; train() and eval() round to nearest, so one
looks at its average and then puts back the bits there were (optim/param_groups.py: evaluation_weights).
"""

import hashlib
import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LARGEST = torch.finfo(torch.bfloat16).max


def stochastic(optimizer: Optimizer, seed: int, boxes: dict[str, tuple] | None = None,
               chunk_mb: float = 64.0) -> Optimizer:  # fmt: skip
    """The same optimizer, whose step() from now on rounds its bf16 parameters stochastically.

    Its groups need full `names`, and are complete. boxes: name -> (whole shape, offsets) of parameters that
    are part of a whole one. chunk_mb: MiB of bf16 parameters that have float32 copies at a time, with their
    gradients 4 times as much memory. Each group counts its steps as `sr_step`, which state_dict() keeps.
    Raises ValueError for groups without names.
    """
    cls, boxes, names = type(optimizer), boxes or {}, {}
    plain_step = cls.step.__wrapped__  # torch wraps step() in what runs the hooks; a chunk must not run them
    for group in optimizer.param_groups:
        if len(group.get("names", ())) != len(group["params"]):
            raise ValueError("stochastic rounding needs the full `names` of each group's parameters, in "
                             "their order; optim/param_groups.py makes such groups")  # fmt: skip
        names |= zip(group["params"], group["names"])
        group.setdefault("sr_step", 0)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        groups, state = self.param_groups, self.state
        try:
            for chunk in chunks(groups, chunk_mb * 2**20):
                works = {p: stand_in(p) for ps in chunk for p in ps}
                self.param_groups = [{**g, "params": [works[p] for p in ps]} for g, ps in zip(groups, chunk)]
                self.state = defaultdict(dict, {w: state[p] for p, w in works.items() if p in state})
                plain_step(self)
                for group, ps in zip(groups, chunk):
                    for p in ps:
                        if works[p] in self.state:
                            state[p] = self.state[works[p]]
                        if works[p] is not p:
                            whole, offsets = boxes.get(names[p], (p.shape, (0,) * p.ndim))
                            index = element_index(p.shape, whole, offsets, p.device)
                            bits = random_bits(seed, group["sr_step"], names[p], index)
                            p.copy_(round_to_bf16(works[p].detach(), bits))
            after = self.param_groups  # what groups count; every chunk began with the same
        finally:
            self.param_groups, self.state = groups, state
        for group, new in zip(groups, after):
            group.update({name: x for name, x in new.items() if name != "params"})
            group["sr_step"] += 1
        return loss

    def load_state_dict(self, saved: dict) -> None:
        """torch's own casts state to the parameter's dtype; here float32 comes back as float32."""
        cls.load_state_dict(self, saved)
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for i, p in zip(ids, [p for group in self.param_groups for p in group["params"]]):
            for name, x in saved["state"].get(i, {}).items():
                if torch.is_tensor(x) and self.state[p][name].dtype == torch.bfloat16 != x.dtype:
                    self.state[p][name] = x.to(p.device, copy=True)

    methods = {"step": Optimizer.profile_hook_step(step), "load_state_dict": load_state_dict}
    methods["step"].hooked = True  # so that torch does not wrap it once more
    optimizer.__class__ = type(cls.__name__, (cls,), methods)
    return optimizer


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
    """What the optimizer steps in place of p: a float32 copy with a float32 gradient, or p where there is
    nothing to round."""
    if p.dtype != torch.bfloat16 or p.grad is None:
        return p
    work = nn.Parameter(p.detach().float(), p.requires_grad)
    work.grad = p.grad.float()
    return work


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bf16: x rounded away from 0 if the half of it that is cut off, plus `bits` (int32, each of
    0 ... 65535 as likely), is 65536 or more."""
    carried = x.clamp(-LARGEST, LARGEST).view(torch.int32) + bits
    rounded = (carried >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


def element_index(shape, whole, offsets, device: torch.device) -> Tensor:
    """int32 (shape): where each element of this box lies in the whole parameter, row by row; modulo 2^32."""
    index, stride = torch.zeros(tuple(shape), dtype=torch.int32, device=device), 1
    for dim in reversed(range(len(shape))):
        along = (torch.arange(shape[dim], device=device) + offsets[dim]) * stride
        index += along.to(torch.int32).view(-1, *[1] * (len(shape) - 1 - dim))
        stride *= whole[dim]
    return index


def random_bits(seed: int, step: int, name: str, index: Tensor) -> Tensor:
    """16 random bits for each index, as int32 (a multiply-and-shift hash, keyed twice by sha256)."""
    digest = hashlib.sha256(f"{seed}:stochastic:{step}:{name}".encode()).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
    h = index * -0x61C88647  # odd, of the golden ratio; products wrap at 32 bits
    for key in keys:
        h += key
        h = (h ^ (h >> 16 & 0xFFFF)).mul_(0x45D9F3B)
    return h >> 16 & 0xFFFF
