"""Activation checkpointing: what backward needs is forgotten in forward and computed once more in
backward.

    none  forward   x0 -> [block 0: a b c] -> x1 -> [block 1: d e f] -> x2   kept: x0 a b c x1 d e f
    full  forward   x0 -> [block 0] -> x1 -> [block 1] -> x2                 kept: x0 x1
          backward  x1 -> [block 1: d e f] dx2 -> dx1    x0 -> [block 0: a b c] dx1 -> dx0

What a layer of model.py keeps in float32, in tensors of (B, T, C), and what is computed again; a
step is 3 F without it, F a forward. (The last product too under dropout, or as a Function of its
own like onednn's.)

    how           modern   gpt2      again
    none          19       16        nothing
    full          1        1         the block up to its last product, whose result nobody needs:
                                     of F's 12C² 8C² and attention, so 11/9 to 4/3 of a step; the
                                     texts' 4/3 is the limit
    full_sharded  1/N      1/N       the same; N tensor parallel ranks share out each block's input
    full_offload  0        0         the same; each block's input waits in host memory
    every_K       1 or 19  1 or 16   the same in each K-th layer (a text's
                                     checkpoint_ratio=.75 takes all)
    segments_K    K/L      K/L       all but the last product of each of K segments of layers
    attention     12       12        q, k, v and attention itself
    mlp           11       8         the first of its two products
    selective     11       11        no product, nor attention: norms, rotations, activations
    offload       0        0         nothing; all that is saved waits in host memory

(track3: modern's and, but for full and selective, 2 more, as gains make norms keep their results.
selective computes FlexAttention again.)

To this comes what backward has made again of one block or segment. With k tensors kept by a layer
in all

    full        L + k              grows with L, k times slower than none
    segments_K  K + k L/K          least at K = sqrt(k L), where it is 2 sqrt(k L): O(sqrt L)

Chen et al. 2016 (1604.06174) choose K = sqrt(L), as if k = 1. Texts call the per-block form O(sqrt
L), and take K = sqrt(L) over for blocks with k = 16 or more: for them, up to L = k, fewer segments
need more than `full`. Attention alone and full_sharded: Korthikanti et al. 2022 (2205.05198).

The `forward` of block, block.attn or block.mlp is replaced, so that hooks on them, FSDP's and
ZeRO's, stay outside and run once. The order: tensor parallelism, this, compile, data parallelism.
Segments alone call blocks anew: FSDP gathers their weights again, (N-1)/N of the bytes, ZeRO-3
holds a segment's at a time. Other collectives in recomputation, per layer, a as in
parallel/tensor.py:

    tp, sp        full, segments, selective: attention's g, with sp both f too   2a, 3a beyond 8a
    full_sharded  an all-gather of the input; not with sp, which cuts it already a more
    cp            all but mlp and offload: forward's messages once more

(The MLP's g comes after its last product.) What is computed again finds torch's random state as
forward did: its own dropout has the same mask; model.py's masks are hashes and need no state.
That costs 5 kB and some 20 µs a block. One's own generators, Python's and NumPy's are not put back.
In evaluation all this does nothing, and so does offloading on a CPU, where all is host memory.
"""

import functools
import itertools
import re
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

HOW = (
    "none",
    "full",
    "full_sharded",
    "full_offload",
    "every_K",
    "segments_K",
    "attention",
    "mlp",
    "selective",
    "offload",
)
PRODUCTS = (
    *(f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")),
    "mkldnn._linear_pointwise",
    *(
        f"aten._scaled_dot_product_{name}_attention{end}"
        for name, end in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
    ),
)


def keep_less(model: nn.Module, how: str, group: dist.ProcessGroup | None = None) -> None:
    """Changes `model`, whose blocks (a ModuleDict by layer number), called with (x, context), each
    have attn and mlp; for segments it also has model.run_blocks(blocks, x, context). group: the
    tensor parallel ranks, for full_sharded; None: it is full. Raises ValueError for another `how`.
    Not for a model whose weight gradients come later (zero bubble): these keep what is recomputed
    here.
    """
    kind, k = parse(how, len(model.blocks))
    if kind == "segments":
        segment = {
            block: i * k // len(model.blocks) for i, block in enumerate(model.blocks.values())
        }
        model.run_blocks = functools.partial(in_segments, model.run_blocks, segment)
    shared = {}
    for name, block in model.blocks.items():
        part = {"attention": block.attn, "mlp": block.mlp}.get(kind, block)
        if kind not in ("none", "offload", "segments") and int(name) % k == 0:
            part.forward = recomputed(
                part.forward, **{"context_fn": selected} if kind == "selective" else {}
            )
        # Hooks around what is recomputed see its input
        if kind == "full_sharded" and group is not None:
            hooks = functools.partial(cut, group), functools.partial(gathered, group)
            part.forward = hooked(part.forward, lambda x, hooks=hooks: hooks)
        elif kind in ("offload", "full_offload"):
            part.forward = hooked(part.forward, functools.partial(trip, shared, block))


def parse(how: str, layers: int) -> tuple[str, int]:
    """("every", 2) for every_2, ("full", 1) for full. Raises ValueError where it is none of HOW."""
    match = re.fullmatch(r"(every|segments)_(\d+)", how)
    kind, k = (match[1], int(match[2])) if match else (how, 1)
    known = (
        how in HOW and not how.endswith("K") if match is None else k <= layers or kind == "every"
    )
    if not known or k < 1:
        raise ValueError(
            f"--activation_checkpoint={how} is not to be had; type --activation_checkpoint= and "
            f"one of {', '.join(HOW)}, with 1 to {layers} (layers here) for K"
        )
    return kind, k


# ---- once more -----------------------------------------------------------------------------------
def recomputed(forward: Callable, **contexts) -> Callable:
    """forward(x, ...), of which backward finds x, and what context_fn keeps; the rest is made
    again, from the same random state. Where no gradients are asked for it is forward itself."""
    always = dict(use_reentrant=False, preserve_rng_state=True)
    return functools.partial(checkpoint, forward, **always, **contexts)


def in_segments(
    through: Callable, segment: dict[nn.Module, int], blocks: list, x: Tensor, context
) -> Tensor:
    """through(blocks, x, context), recomputed segment by segment, or what a pipeline's stage runs
    of it."""
    for _, part in itertools.groupby(blocks, segment.get):
        x = recomputed(functools.partial(through, list(part)))(x, context)
    return x


def selected():
    """Two contexts: one in which results of products are kept, one in which they are taken from
    there."""
    found = (
        functools.reduce(lambda x, name: getattr(x, name, None), path.split("."), torch.ops)
        for path in PRODUCTS
    )
    products = {packet.default for packet in found if packet is not None}
    return create_selective_checkpoint_contexts(functools.partial(kept, products))


def kept(products: set, context, op, *args, **named) -> CheckpointPolicy:
    """Products and attention are, but not attention that drops weights: it draws random numbers,
    and what draws after it finds the right ones only if these are drawn again."""
    names = (argument.name for argument in op._schema.arguments) if op in products else ()
    drops = (dict(zip(names, args)) | named).get("dropout_p", 0) > 0
    save = op in products and not drops
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


# ---- kept elsewhere ------------------------------------------------------------------------------
def hooked(forward: Callable, start: Callable) -> Callable:
    """forward(x, ...), what it saves going through start(x) = pack, unpack."""

    def with_hooks(x: Tensor, *args):
        with saved_tensors_hooks(*start(x)):
            return forward(x, *args)

    return with_hooks


def cut(group: dist.ProcessGroup, x: Tensor) -> tuple[torch.Size, Tensor]:
    return x.shape, x.reshape(group.size(), -1)[dist.get_rank(group)].clone()


def gathered(group: dist.ProcessGroup, packed: tuple[torch.Size, Tensor]) -> Tensor:
    shape, mine = packed
    whole = mine.new_empty(group.size(), mine.numel())
    dist.all_gather([*whole], mine, group=group)
    return whole.view(shape)


def trip(shared: dict, block: nn.Module, x: Tensor) -> tuple[Callable, Callable]:
    """pack, unpack of a new Trip. shared: the copies' stream, and the trip of the forward before
    this one."""
    stream = shared["stream"] = shared.get("stream") or (
        torch.cuda.Stream(x.device) if x.is_cuda else None
    )
    new = Trip(block, x.device, stream, shared.get("last", lambda: None))
    shared["last"] = weakref.ref(new)
    return new.pack, new.unpack


class Trip:
    """What one forward saves, each storage once and no weights, to host memory and back: on a GPU
    beside the computing, in backward one block ahead. before(): the trip that ends after this
    one."""

    def __init__(self, block: nn.Module, device: torch.device, stream, before: Callable):
        self.weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
        self.device, self.stream, self.before = device, stream, before
        self.seen, self.hosts, self.back = {}, [], None

    def pack(self, x: Tensor) -> Tensor | tuple:
        storage = x.untyped_storage()
        if storage.data_ptr() in self.weights:
            return x
        i, known = self.seen.get(storage.data_ptr(), (0, lambda: None))
        if known() is None:  # new, or where something was that is gone
            i = len(self.hosts)
            self.seen[storage.data_ptr()] = i, weakref.ref(storage)
            self.hosts.append(self.send(x.new_empty(0, dtype=torch.uint8).set_(storage)))
        return i, x.dtype, x.storage_offset(), x.shape, x.stride()

    def send(self, x: Tensor) -> Tensor:
        if self.stream is None:
            return x.cpu()
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is given away only after that
        return host

    def fetch(self) -> None:
        with torch.cuda.stream(self.stream):  # None changes nothing
            self.back = self.back or [
                host.to(self.device, non_blocking=True) for host in self.hosts
            ]

    def unpack(self, packed: Tensor | tuple) -> Tensor:
        if torch.is_tensor(packed):
            return packed
        if self.before is not None:  # the first one that backward asks for
            self.fetch()
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                for x in self.back:
                    x.record_stream(torch.cuda.current_stream(self.device))
            following, self.before = self.before(), None
            if following is not None:
                following.fetch()
        i, dtype, *where = packed
        return torch.empty(0, dtype=dtype, device=self.device).set_(
            self.back[i].untyped_storage(), *where
        )
