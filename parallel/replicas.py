"""What data-parallel layouts are made of: memory, one start, messages, the roll call, owners.

    allocate             memory for parameters on the meta device         once
    broadcast_start      rank 0's weights on every replica                once
    fill                 this rank's rows of a weight, from a source      once
    blocks_of            a model's layers, one after the other            once
    named_groups         an optimizer's groups, with names                once
    make_buckets         many small tensors, one message                  each step
    RollCall             which gradients are missing on which ranks       each step
    StepGuard            a step at the wrong moment is refused            each step
    is_elementwise       may the rows of a parameter be stepped apart     once
    deal                 which ranks hold which parameter, or its rows    once
    refuse_coupled       optimizers that cannot be dealt out to ranks     once

Each part stands for itself and none knows a layout. parallel/ddp.py, zero.py, fsdp.py and diloco.py
need no other file.

Example:
    import torch
    from parallel.replicas import deal, make_buckets

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    buckets = make_buckets(list(model.named_parameters()), limit=50)  # bytes
    names = [[name for name, _ in bucket] for bucket in buckets]
    assert names == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]

    shapes = {name: p.shape for name, p in model.named_parameters()}
    holders = deal(shapes, by_rows={"0.bias", "1.bias"}, n=2)
    print(holders)  # each weight has one owner, all ranks share the rows of a bias
    assert holders["0.weight"] == (0,) and holders["1.weight"] == (1,)
    assert [*holders["0.bias"]] == [0, 1]
"""

import heapq
import inspect
import math
import os
import shutil
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


# ---- memory for parameters: on a device, or in files ---------------------------------------------
def allocate(module: nn.Module, device: torch.device, keep=lambda p: True) -> nn.Module:
    """Gives uninitialised memory to the parameters on the meta device, in place.

    keep: which of them get memory, default all. Unlike with `Module.to_empty`, a tied parameter
    stays one parameter.
    """
    real = {}  # meta parameter -> the allocated one
    for submodule in module.modules():
        for name, p in submodule.named_parameters(recurse=False, remove_duplicate=False):
            if p.is_meta and keep(p):
                if p not in real:
                    # Not empty_like: on a meta tensor it imports a compiler, which takes a second.
                    empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                    real[p] = nn.Parameter(empty, p.requires_grad)
                setattr(submodule, name, real[p])
    return module


def mapped_file(path: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor (numel,) whose memory is the file `path`.

    Raises OSError if the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = numel * dtype.itemsize
    try:
        with open(path, "wb") as file:
            # Take the room now: later a full disk is a bus error in the middle of a step.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path.parent} has no room for offloaded weights: one more file needs {size:,} bytes, "
            f"{shutil.disk_usage(path.parent).free:,} are free ({error.strerror})"
        ) from error
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


# ---- one start: the weights of rank 0 on every replica -------------------------------------------
# A broadcast holds a copy of what it sends, so not of the whole model.
START_BYTES = 25 * 2**20


@torch.no_grad()
def broadcast_start(
    model: nn.Module,
    group: dist.ProcessGroup | None,
    device: torch.device,
    others: dict[str, dist.ProcessGroup | None] | None = None,
) -> None:
    """Moves the model's own weights and buffers to `device`; all replicas get those of rank 0.

    others: name -> the group of the replicas of this parameter, where it is not `group`; None: one.

    Parameters keep their identity. Those on the meta device have no numbers: they stay there, and a
    model that has no others sends nothing. (torch's DDP broadcasts likewise.)
    """
    named = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
    # Weights that are functions of their names are alike already, and so are the buffers.
    if not named:
        return
    named += [(name, x) for name, x in model.named_buffers() if not x.is_meta]
    for _, x in named:
        x.data = x.data.to(device)
    for members, some in by_group(named, group, others or {}):
        for bucket in make_buckets(some, START_BYTES) if members is not None else ():
            tensors = [x.detach() for _, x in bucket]
            flat = torch.cat([x.flatten() for x in tensors])
            # As bytes, because gloo knows no bool and no 8-bit floats.
            dist.broadcast(flat.view(torch.uint8), group=members, group_src=0)
            for x, sent in zip(tensors, split_like(flat, tensors)):
                x.copy_(sent)


def by_group(
    named: list[tuple[str, Tensor]],
    group: dist.ProcessGroup | None,
    others: dict[str, dist.ProcessGroup | None],
) -> Iterator[tuple]:
    """(the group of these replicas, consecutive (name, tensor) pairs); others: see above."""
    for _, pairs in groupby(named, lambda pair: id(others.get(pair[0], group))):
        pairs = list(pairs)
        yield others.get(pairs[0][0], group), pairs


# ---- a source of weights: init_weights(source) ---------------------------------------------------
def fill(
    out: Tensor, source: Callable, name: str, shape: Sequence[int] | None = None, first: int = 0
) -> None:
    """Sets `out` to rows first to first + len(out) of source(name, shape), a tensor on the CPU.

    shape: of the full tensor; None: out's. A source may have a method fill(out, name, (full shape,
    offsets)), as a checkpoint's has: then nothing else is read, and into its place. A shard may
    begin past the end if it has no rows.
    """
    out = out.detach()
    shape = tuple(out.shape if shape is None else shape)
    if hasattr(source, "fill"):
        offsets = (min(first, shape[0]), *[0] * (len(shape) - 1)) if shape else ()
        source.fill(out, name, (shape, offsets))
        return
    full = source(name, shape)
    out.copy_(full[first : first + len(out)] if shape else full)


# ---- other people's models and groups ------------------------------------------------------------
def blocks_of(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """Full name -> module of the layers in model.`path`, a ModuleDict, ModuleList or Sequential.

    "" means that the model itself is one. Raises ValueError where there is none.
    """
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        holder = nn.Module()
    blocks = dict(holder.named_children())
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no layers in {path!r}; give blocks= the name of its "
            "ModuleList, ModuleDict or Sequential, such as blocks='layers', or '' for its children"
        )
    return {f"{path}.{name}" if path else name: block for name, block in blocks.items()}


def named_groups(model: nn.Module, groups) -> list[dict]:
    """The groups, given as torch's optimizers take them, each with lists `params` and `names`.

    Raises ValueError for a parameter that is not the model's.
    """
    groups = list(groups)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    names = {p: name for name, p in model.named_parameters()}
    result = []
    for group in groups:
        params = group["params"]
        params = [params] if torch.is_tensor(params) else list(params)
        # named_parameters() gives pairs.
        params = [p[1] if isinstance(p, tuple) else p for p in params]
        strange = [tuple(p.shape) for p in params if "names" not in group and p not in names]
        if strange:
            raise ValueError(
                f"make_optimizer: a parameter of shape {strange[0]} is not the model's; call it "
                "after parallelize(), with parameters of the model that parallelize() returned"
            )
        found = group["names"] if "names" in group else [names[p] for p in params]
        result.append(group | {"params": params, "names": list(found)})
    return result


# ---- buckets: one message for many gradients or weights ------------------------------------------
#     parameters     a (2, 3)   b (4,)   c (2, 2)   d (10, 10)
#     buckets        [a a a a a a b b b b c c c c]  [d d d ... d]       at most `limit` bytes each
#
# A message costs its latency whatever its size, so small tensors travel together. A bucket is not
# the whole model either, so that its message can start while backward still computes.
def make_buckets(
    named: list[tuple[str, nn.Parameter]], limit: float
) -> list[list[tuple[str, nn.Parameter]]]:
    """Groups consecutive (name, parameter) pairs into buckets of at most `limit` bytes.

    All parameters of a bucket have one dtype and one device. A larger parameter is alone.
    """
    buckets = []
    size = 0
    kind = None
    for name, p in named:
        # No parameter is of kind None, so the first one opens a bucket.
        is_same_kind = kind == (p.dtype, p.device)
        if not is_same_kind or size + p.nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append((name, p))
        size += p.nbytes
        kind = (p.dtype, p.device)
    return buckets


def split_like(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of `flat` (n,), one after the other, in the shapes of the tensors `like`.

    What remains at the end of `flat` is left out.
    """
    sizes = [x.numel() for x in like]
    return [view.view(x.shape) for view, x in zip(flat[: sum(sizes)].split(sizes), like)]


def is_gloo(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Does gloo carry this device's messages? A group may have several backends."""
    return group._get_backend(device).name() == "gloo"


# Under the names that torch gives them from 2.13 on; before, it had others.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- the roll call: which gradients are missing on which ranks -----------------------------------
#     rank 0 has    a b . .            a b c .      summed; a gradient that a rank lacks is zero
#     rank 1 has    a . c .    --->    . . . d      missing on all: None, so weight and state stay
#
# One all-reduce of a byte for each parameter: 2 (N-1)/N bytes per parameter, rank and step. A
# gradient of zeros is not missing. (torch's DDP asks the same with find_unused_parameters=True.)
class RollCall:
    """Which parameters got a gradient on any replica?

    has_gradient: for each parameter, whether it has a gradient here. All replicas call at the same
    moment. The answer is the maximum of their bytes, and only a replica that lacks a gradient
    reads it.
    """

    def __init__(self, has_gradient: list[bool], group: dist.ProcessGroup, device: torch.device):
        world = dist.get_world_size(group)
        self.flags = torch.tensor(has_gradient, dtype=torch.uint8)
        self.flags = self.flags.to(device, non_blocking=True)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=group, async_op=True)
        self.sent_bytes = 2 * (world - 1) * len(has_gradient) // world

    def missing_everywhere(self, indices: list[int]) -> list[int]:
        """Those of these parameters, by index, for which no replica has a gradient."""
        self.work.wait()
        if not indices:
            return []
        # Here alone the host waits for a GPU: most steps lack nothing and never come here.
        flags = self.flags.tolist()
        return [i for i in indices if not flags[i]]


def drop_stand_ins(
    params: list[nn.Parameter],
    got: set[nn.Parameter],
    group: dist.ProcessGroup | None,
    device: torch.device,
    sums: list[nn.Parameter] | None = None,
) -> int:
    """Sets the sum of p's gradients to None where no replica has one and zeros stand in for it.

    got: the parameters that got a gradient here; it is emptied. sums: for each of `params` the
    parameter whose `grad` is the sum, by default itself. Returns the bytes sent.
    """
    if group is None or not params:
        return 0
    sums = params if sums is None else sums
    call = RollCall([p in got for p in params], group, device)
    # What is in the gradient does not tell: a true one may be zero as well.
    stand_ins = [i for i, p in enumerate(params) if sums[i].grad is not None and p not in got]
    for i in call.missing_everywhere(stand_ins):
        sums[i].grad = None
    got.clear()
    return call.sent_bytes


def on_gradient(p: nn.Parameter, arrived: Callable[[nn.Parameter], None]) -> None:
    """Calls arrived(p) when a backward has added to p.grad, also if p is frozen now and thaws."""
    # torch takes a hook only while p requires a gradient.
    requires_grad = p.requires_grad
    if requires_grad or p.is_floating_point():
        p.requires_grad_().register_post_accumulate_grad_hook(arrived)
        p.requires_grad_(requires_grad)


# ---- forgotten calls: a step at the wrong moment -------------------------------------------------
TOO_EARLY = (
    "optimizer.step() came before finish_gradients(): these gradients are not yet the sums over "
    "all replicas, whose weights would part; call finish_gradients() after the last backward()"
)


# Of all layouts alive. Weak, so that none is kept alive, nor its model.
GUARDS = weakref.WeakSet()


class StepGuard:
    """Raises RuntimeError where an optimizer's step() would move the replicas apart in silence.

    layout: has `unfinished`, true from a backward until the gradients are summed
    params(): the parameters it watches in any optimizer, also one that the user made
    too_early: the message for a step with an unfinished gradient of these
    only_own: the message for a step of theirs by an optimizer that `admit` does not know; "": any
        optimizer may step them

    It watches as long as the layout lives.
    """

    def __init__(
        self,
        layout,
        params: Callable[[], Iterable[nn.Parameter]],
        too_early: str = TOO_EARLY,
        only_own: str = "",
    ):
        self.layout = layout
        self.params = params
        self.too_early = too_early
        self.only_own = only_own
        self.admitted = weakref.WeakSet()
        self.in_admitted_step = False
        GUARDS.add(self)

    def admit(self, optimizer: Optimizer) -> Optimizer:
        """The same optimizer, whose parameters may be others: the layout made it."""
        self.admitted.add(optimizer)
        optimizer.register_step_pre_hook(self.before_admitted)
        optimizer.register_step_post_hook(self.after_admitted)
        return optimizer

    def before_admitted(self, *_) -> None:
        if self.layout.unfinished:
            raise RuntimeError(self.too_early)
        # It may hand its parameters to other optimizers, which it knows and we do not.
        self.in_admitted_step = True

    def after_admitted(self, *_) -> None:
        self.in_admitted_step = False

    def check(self, optimizer: Optimizer) -> None:
        # A step that raised has left the flag behind; the next backward ends what it says.
        is_inside = self.in_admitted_step and not self.layout.unfinished
        is_known = optimizer in self.admitted or is_inside
        if is_known or not (self.only_own or self.layout.unfinished):
            return
        watched = {id(p) for p in self.params()}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in watched]
        if held and self.only_own:
            raise RuntimeError(self.only_own)
        # Dropped gradients (None) are no longer unfinished.
        if any(p.grad is not None for p in held):
            raise RuntimeError(self.too_early)


def check_all(optimizer: Optimizer, *_) -> None:
    for guard in list(GUARDS):
        guard.check(optimizer)


# torch calls it before every step of every optimizer. It is never removed: that could happen while
# torch goes through its hooks.
register_optimizer_step_pre_hook(check_all)


# ---- owners: which of n ranks holds which parameter, or which of its rows ------------------------
# Torch's own optimizers that step each element by itself; subclasses may not.
ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in "SGD ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop".split()
}


def is_elementwise(cls: type[Optimizer], group: dict) -> bool:
    """May a shard of a parameter in this group be stepped alone? A class that is silent: no."""
    return getattr(cls, "elementwise", cls in ELEMENTWISE) or is_spared(cls, group)


def is_spared(cls: type[Optimizer], group: dict) -> bool:
    """Is the group outside what a method of whole matrices works on?"""
    # A class that wears hooks (hooks/wear.py), of an optimizer that steps each element by itself.
    elsewhere = getattr(cls, "elementwise_elsewhere", None)
    elsewhere = elsewhere or (elsewhere is False and any(c in ELEMENTWISE for c in cls.__mro__))
    return group.get("use_muon") is False or (elsewhere and group.get("kind", "matrix") != "matrix")


# Plain arithmetic, so every rank computes the same answer and nobody has to be told:
#
#     owners_by_size    full parameters; on every rank about as many elements
#     deal              rows where an optimizer can step them alone, else full parameters
#
# memory/ranks.py and memory/plan.py call them for thousands of ranks, so a heap finds the rank
# with the least load.
def owners_by_size(shapes: list[tuple[int, ...]], n: int) -> list[int]:
    """The owner of each parameter among n ranks: about as many elements on every rank.

    The largest parameter comes first, and each goes to the rank with the fewest elements so far. So
    matrices of one shape go round all ranks, and with them the work: Newton-Schulz on a (m, n)
    matrix, m <= n, takes about m multiplications an element.
    """

    def largest_first(i: int) -> tuple:
        return -math.prod(shapes[i]), shapes[i]

    if not shapes:
        return []
    owners = [0] * len(shapes)
    # Equal loads go to the lower rank. A list in order is a heap already.
    heap = [(0, rank) for rank in range(n)]  # (elements, rank)
    for i in sorted(range(len(shapes)), key=largest_first):
        elements, rank = heap[0]
        owners[i] = rank
        heapq.heapreplace(heap, (elements + math.prod(shapes[i]), rank))
    return owners


def deal(
    shapes: dict[str, tuple[int, ...]], by_rows: Collection[str], n: int
) -> dict[str, Sequence[int]]:
    """The ranks, of n, that hold each parameter: its one owner, or those that share its rows.

    by_rows: the names of parameters that may be cut by rows. Their rows are shared equally by all
    ranks. Only a parameter larger than a rank's share of the model may leave ranks out, those with
    the most full matrices, where all ranks together would be much less even (an embedding, on more
    ranks than there are large matrices). A name in `by_rows` that is no shape's is ignored.
    """
    everyone = range(n)
    # A number has no rows, and an empty parameter none to share out.
    full = [name for name, x in shapes.items() if name not in by_rows or 0 in (len(x), *x)]
    owners = owners_by_size([shapes[name] for name in full], n)
    held = {name: (owner,) for name, owner in zip(full, owners)}

    load = [0] * n  # elements of full parameters on each rank
    for name, owner in zip(full, owners):
        load[owner] += math.prod(shapes[name])
    share = sum(math.prod(shape) for shape in shapes.values()) / n
    large = {name for name, shape in shapes.items() if math.prod(shape) > share} - held.keys()
    rows = sum(math.prod(shapes[name]) for name in large)
    lightest = lightest_ranks(load, rows)
    for name in shapes:
        if name not in held:
            held[name] = lightest if name in large else everyone
    return held


def lightest_ranks(load: list[int], rows: int) -> Sequence[int]:
    """The ranks that share `rows` elements; rank r has load[r] elements already.

    Those with the least load, as many as make the fullest rank least full; all, where that is not
    5 % better, for one message among all is cheaper than one from each.
    """
    n = len(load)
    if not any(load):
        return range(n)
    by_load = sorted(range(n), key=lambda rank: load[rank])

    def fullest(k: int) -> float:
        return max(load[by_load[-1]], load[by_load[k - 1]] + rows / k)

    best = min(range(n, 0, -1), key=fullest)
    if fullest(best) > 0.95 * fullest(n):
        return range(n)
    return sorted(by_load[:best])


# ---- coupled optimizers: their step of one parameter depends on others ---------------------------
TRIAL_STEPS = 20


def refuse_coupled(cls: type[torch.optim.Optimizer], groups: list[dict], arguments: dict) -> None:
    """Raises ValueError for a method that couples parameters, such as Prodigy or LBFGS.

    If its parameters are dealt out to ranks, or stepped one after the other, such a method would
    silently be another one. The class is tried, not asked: it steps a matrix alone and beside
    another one, in float64, with the options of the first group. If it cannot be tried here (its
    options need a GPU, say), it passes.
    """
    why = (
        f"{cls.__name__} looks at all parameters together, and here they are stepped apart; take a"
        " layout in which one optimizer has them all (--data_parallel=ddp), or another optimizer"
    )
    # A method that must be given a closure computes the loss again and again, as LBFGS does.
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(why)

    not_options = ("params", "names", "param_names", "kind")
    options = {key: value for key, value in groups[0].items() if key not in not_options}
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 2, 2, generator=generator, dtype=torch.double)
    noise = torch.randn(TRIAL_STEPS, 2, 2, 2, generator=generator, dtype=torch.double)

    def moved(n: int, sign: int) -> torch.Tensor:
        """By how much the steps move the first of n matrices, a (2, 2) tensor.

        sign=-1: the second matrix's gradient changes its sign from step to step.
        """
        params = [nn.Parameter(w.clone()) for w in weights[:n]]
        optimizer = cls([{**options, "params": params}], **arguments)
        if hasattr(optimizer, "train"):
            optimizer.train()  # Schedule-Free refuses to step otherwise
        for step in range(TRIAL_STEPS):
            # A method that draws noise must draw the same for the first matrix.
            torch.random.default_generator.manual_seed(step)
            # The second gradient is 100 times larger, so that its influence shows.
            for p, g, scale in zip(params, noise[step], (1, 100 * sign**step)):
                p.grad = scale * (1 + g / 10)
            optimizer.step()
        return params[0].detach() - weights[0]

    # The trial seeds the CPU's generator, which gets its state back. (torch.manual_seed would seed
    # those of GPUs, too.)
    with torch.random.fork_rng(devices=[]):
        try:
            alone = moved(1, 1)
            beside = [moved(2, 1), moved(2, -1)]
        except Exception:
            return
    tolerance = 1e-6 * alone.abs().max()
    if max((alone - x).abs().max() for x in beside) > tolerance:
        raise ValueError(why)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
