"""Activation checkpointing: forward keeps less, and backward computes the rest once more.

    none  forward   x0 -> [block 0: a b c] -> x1 -> [block 1: d e f] -> x2   kept: x0 a b c x1 d e f
    full  forward   x0 -> [block 0] -> x1 -> [block 1] -> x2                 kept: x0 x1
          backward  x1 -> [block 1: d e f] dx2 -> dx1    x0 -> [block 0: a b c] dx1 -> dx0

What a layer of model.py keeps in float32, in tensors of (B, T, C), and what is computed again. F is
a forward; a step is 3 F without checkpointing. (The last product is computed again, too, under
dropout, and where it is an autograd Function of its own, like onednn's.)

    how           keeps     again
    none          10        norms and activations, by layers/recompute.py
    full          1         the block up to its last product, whose result nobody needs: 8C² and
                            attention of F's 12C², so 11/9 to 4/3 of a step; the texts' 4/3 is the
                            limit
    full_sharded  1/N       the same; N tensor parallel ranks share out each block's input
    full_offload  0         the same; each block's input waits in host memory
    every_K       1 or 10   the same in each K-th layer (checkpoint_ratio=.75 in a text takes all
                            layers)
    segments_K    K/L       all but the last product of each of K segments of layers
    attention     6         q, k, v and attention itself
    mlp           6         the first of its two products
    selective     11        no product, nor attention: norms, rotations, activations
    offload       0         nothing; all that is saved waits in host memory

(An MLP with a gate keeps 2 w/C tensors, w its width, where that of the table keeps 4. Experts, k of
a token, keep k (w/C + 1), with a gate k (2 w/C + 1), and selective computes them again. With
layers/recompute.py, selective keeps what none does, and one product more: it is of use to blocks
without it. It computes FlexAttention again.)

Backward also holds what it has computed again of one block or segment. If a layer keeps k tensors
without checkpointing, the peak is

    full        L + k              grows with L, k times slower than none
    segments_K  K + k L/K          least at K = sqrt(k L), where it is 2 sqrt(k L): O(sqrt L)

Chen et al. 2016 (1604.06174) choose K = sqrt(L), as if k = 1. Texts call the per-block form O(sqrt
L), and use K = sqrt(L) for blocks with k = 10 or more. For these blocks fewer segments than layers
need more memory than `full`, up to L = k. Attention alone and full_sharded: Korthikanti et al. 2022
(2205.05198).

The `forward` of block, block.attn or block.mlp is replaced, so that FSDP's and ZeRO's hooks on them
stay outside and run once. The order: tensor parallelism, this, compile, data parallelism. Segments
alone call blocks anew: FSDP gathers their weights again, (N-1)/N of the bytes, and ZeRO-3 holds the
weights of one segment at a time. Other collectives in recomputation, per layer, a as in
parallel/tensor.py:

    tp, sp        full, segments, selective: attention's g, with sp both f too   2a, 3a beyond 8a
    full_sharded  an all-gather of the input; not with sp, which shards it already  a more
    cp            all but mlp and offload: forward's messages once more

(The MLP's g comes after its last product.) Recomputation finds torch's random state as forward
found it: a module's own dropout has the same mask, at a cost of 5 kB and some 20 µs a block.
model.py's masks are hashes and need no state. Python's, NumPy's and a user's own generators are not
restored. In evaluation all this does nothing. Nor does offloading on a CPU, where all is host
memory.

Example:
    import copy
    import torch
    from torch import nn
    from memory.activation_checkpoint import apply_activation_checkpointing
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Linear(8, 8)
            self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        def forward(self, x, context=None):
            return x + self.mlp(self.attn(x))
    model = nn.Module()
    model.blocks = nn.ModuleDict({str(i): Block() for i in range(2)})
    plain = copy.deepcopy(model)
    apply_activation_checkpointing(model, "full")
    x = torch.randn(4, 8)
    for m in plain, model:
        m.blocks["1"](m.blocks["0"](x)).square().sum().backward()
    pairs = zip(plain.parameters(), model.parameters())
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
"""

import functools
import itertools
import re
import weakref
from collections.abc import Callable, Iterator

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
# The operators whose results `selective` keeps: matrix products and attention.
PRODUCTS = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._scaled_mm",
    "aten._scaled_mm_v2",
    "nanoscale.scaled_mm",
    "mkldnn._linear_pointwise",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
)


def apply_activation_checkpointing(
    model: nn.Module, how: str, group: dist.ProcessGroup | None = None
) -> None:
    """Replaces the forward of `model`'s blocks, or of a part of each, as `how` says.

    model.blocks: a ModuleDict by layer number; a block is called with (x, context) and has attn and
    mlp. For segments the model also has run_blocks(blocks, x, context). group: the tensor parallel
    ranks, for full_sharded; without it full_sharded is full. Raises ValueError for another `how`.

    Not for a model that computes weight gradients later (zero bubble): they keep the activations
    that would be computed again here.
    """
    kind, k = parse(how, len(model.blocks))
    if kind == "none":
        return
    if kind == "segments":
        segment_of = {}
        for i, block in enumerate(model.blocks.values()):
            segment_of[block] = i * k // len(model.blocks)
        model.run_blocks = functools.partial(in_segments, model.run_blocks, segment_of)
        return
    shared = {}  # between the trips of all blocks
    contexts = {"context_fn": keep_products} if kind == "selective" else {}
    for name, block in model.blocks.items():
        module = {"attention": block.attn, "mlp": block.mlp}.get(kind, block)
        if kind != "offload" and int(name) % k == 0:
            module.forward = recomputed(module.forward, **contexts)

        # These hooks are around the recomputed forward, so what they see is its input.
        if kind == "full_sharded" and group is not None:
            pack = functools.partial(shard, group)
            unpack = functools.partial(gather, group)
            module.forward = hooked(module.forward, lambda *_, hooks=(pack, unpack): hooks)
        elif kind in ("offload", "full_offload"):
            # The compiler would take a weak reference for the object itself.
            start = torch.compiler.disable(start_trip)
            module.forward = hooked(module.forward, functools.partial(start, shared, block))


def parse(how: str, layers: int) -> tuple[str, int]:
    """("every", 2) for every_2, ("full", 1) for full. Raises ValueError where it is none of HOW."""
    match = re.fullmatch(r"(every|segments)_(\d+)", how)
    if match is None:
        kind = how
        k = 1
        is_known = how in HOW and not how.endswith("K")
    else:
        kind = match[1]
        k = int(match[2])
        # There are no more segments than layers, while every_9 of 4 layers means layer 0 alone.
        is_known = k >= 1 and (k <= layers or kind == "every")
    if not is_known:
        raise ValueError(
            f"--activation_checkpoint={how} is not available; type --activation_checkpoint= and "
            f"one of {', '.join(HOW)}, with 1 to {layers} (layers here) for K"
        )
    return kind, k


# ---- computed again ------------------------------------------------------------------------------
def recomputed(forward: Callable, **contexts) -> Callable:
    """forward(x, ...), which keeps x and what context_fn keeps; backward computes the rest again.

    It does so from the same random state. Without gradients it is forward itself.
    """
    always = dict(use_reentrant=False, preserve_rng_state=True)
    return functools.partial(checkpoint, forward, **always, **contexts)


def in_segments(
    run_blocks: Callable, segment_of: dict[nn.Module, int], blocks: list, x: Tensor, context
) -> Tensor:
    """run_blocks(blocks, x, context), recomputed segment by segment.

    blocks: all of the model's, or those that a pipeline's stage runs now.
    """
    for _, segment in itertools.groupby(blocks, segment_of.get):
        x = recomputed(functools.partial(run_blocks, list(segment)))(x, context)
    return x


def keep_products():
    """Two contexts: forward's keeps the results of products, and backward's finds them there."""
    products = set()
    for path in PRODUCTS:
        packet = torch.ops
        for name in path.split("."):
            packet = getattr(packet, name, None)
        # A build of torch lacks the kernels that are not for its devices.
        if packet is not None:
            products.add(packet.default)
    return create_selective_checkpoint_contexts(functools.partial(policy, products))


def policy(products: set, context, op, *args, **named) -> CheckpointPolicy:
    """Keeps the results of products and of attention, unless this attention has dropout.

    Dropout draws random numbers. Later draws find the right ones only if these are drawn again.
    """
    if op not in products:
        return CheckpointPolicy.PREFER_RECOMPUTE
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args)) | named
    if given.get("dropout_p", 0) > 0:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


# ---- kept elsewhere ------------------------------------------------------------------------------
def hooked(forward: Callable, start: Callable) -> Callable:
    """forward(x, ...) whose saved tensors pass the two hooks start(x, ...) = (pack, unpack)."""

    def with_hooks(x: Tensor, *args):
        with saved_tensors_hooks(*start(x, *args)):
            return forward(x, *args)

    return with_hooks


def shard(group: dist.ProcessGroup, x: Tensor) -> tuple[torch.Size, Tensor]:
    """Keeps this rank's 1/N of a tensor that all ranks of the group hold."""
    # Clone: a view would keep all N parts in memory.
    return x.shape, x.reshape(group.size(), -1)[dist.get_rank(group)].clone()


def gather(group: dist.ProcessGroup, packed: tuple[torch.Size, Tensor]) -> Tensor:
    shape, mine = packed
    full = mine.new_empty(group.size(), mine.numel())
    dist.all_gather([*full], mine, group=group)
    return full.view(shape)


def start_trip(shared: dict, block: nn.Module, x: Tensor, *context) -> tuple[Callable, Callable]:
    """(pack, unpack) of a new Trip. shared: the stream of all copies, and the newest trip.

    context: of the block's forward. All blocks have the same one, so it stays.
    """
    # All blocks' copies are on one stream, in order: who waits for it waits for all of them.
    if x.is_cuda and shared.get("stream") is None:
        shared["stream"] = torch.cuda.Stream(x.device)
    before = shared.get("newest", lambda: None)
    trip = Trip(block, x.device, shared.get("stream"), before, [*tensors_in(context)])
    # A weak reference: a forward without a backward leaves nothing behind.
    shared["newest"] = weakref.ref(trip)
    return trip.pack, trip.unpack


def tensors_in(found) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    if torch.is_tensor(found):
        yield found
    elif isinstance(found, tuple):
        for part in found:
            yield from tensors_in(part)


class Trip:
    """One forward's saved tensors on their way to host memory and back.

    Each storage travels once; weights and `staying` do not travel. On a GPU the copies run beside
    the computing, in backward one block ahead. before(): the trip of the forward before this one,
    whose backward comes after this one's.

    The allocators know a tensor by the stream it was made on. record_stream tells them of the other
    one; torch records each copy's event on pinned memory by itself, so a host copy that is dropped
    is not given away while it is read (CachingHostAllocator.h; read, not run on a GPU yet). Pinned
    blocks are powers of two, see memory/offload.py.
    """

    def __init__(
        self, block: nn.Module, device: torch.device, stream, before: Callable, staying=()
    ):
        # A Trip begins inside the forward, when FSDP and ZeRO have the block's weights gathered.
        here = [*block.parameters(), *staying]
        self.staying = {x.untyped_storage().data_ptr() for x in here}
        self.device = device
        self.stream = stream
        self.before = before
        self.seen = {}  # address -> (index in hosts, weak reference to the storage)
        self.hosts = []  # the copies in host memory
        self.back = None  # the copies on the device, once fetched

    def pack(self, x: Tensor) -> Tensor | tuple:
        # On a GPU attention also saves two numbers of its random state, which are on the host.
        if x.device != self.device:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() in self.staying:
            return x
        i, known = self.seen.get(storage.data_ptr(), (0, lambda: None))
        # A new storage, or one at the address of another that is gone.
        if known() is None:
            i = len(self.hosts)
            self.seen[storage.data_ptr()] = i, weakref.ref(storage)
            self.hosts.append(self.send(x.new_empty(0, dtype=torch.uint8).set_(storage)))
        return i, x.dtype, x.storage_offset(), x.shape, x.stride()

    def send(self, x: Tensor) -> Tensor:
        if self.stream is None:
            return x.cpu()
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        # The copy begins when x is computed.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        # The allocator gives x's memory away only after the copy.
        x.record_stream(self.stream)
        return host

    def fetch(self) -> None:
        if self.back:
            return
        # A stream of None changes nothing.
        with torch.cuda.stream(self.stream):
            self.back = [host.to(self.device, non_blocking=True) for host in self.hosts]

    def unpack(self, packed: Tensor | tuple) -> Tensor:
        if torch.is_tensor(packed):
            return packed  # a weight, or what has not left
        # The first tensor that backward asks for brings all, and starts the next block's copies.
        if self.before is not None:
            self.fetch()
            if self.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                for x in self.back:
                    x.record_stream(torch.cuda.current_stream(self.device))
            following = self.before()
            self.before = None
            if following is not None:
                following.fetch()
        i, dtype, *where = packed
        x = torch.empty(0, dtype=dtype, device=self.device)
        return x.set_(self.back[i].untyped_storage(), *where)


if __name__ == "__main__":
    for how in HOW:
        print(f"python train.py --activation_checkpoint={how.replace('K', '2')}")
