"""Each layout's bytes, traffic and time on paper, for a model and a cluster that we cannot try.

    python -m memory.plan --params=70B --gpus=512     # A100s, 4 Mi tokens a step
    python -m memory.plan --n_layer=126 --n_embd=16384 --n_head=128 --gpus=8192 --gpu=H100
    python -m memory.plan --params=7e9 --gpus=64 --memory=40e9 --bandwidth=12.5e9 --batch=512
    python -m memory.plan --n_layer=16 --n_embd=1024 --n_expert=16 --gpus=8    # with experts
    python -m memory.plan runs                        # what the course texts claim

memory/estimate.py predicts the memory of the fullest stage, with AdamW. tp divides weights,
gradients and state. Of the activations 10/34 + 24/34/tp stay, with sp 1/tp (Korthikanti et al.),
times the micro-batches in flight (1f1b pp, interleaved pp + (pp-1)/chunks, zero-bubble H1 pp). A
plan fills at most 0.9 of a device. What a rank sends in a step of m micro-batches of t tokens on a
rank, in bytes; r is the share of blocks recomputed (full 1, every_K 1/K), n = dp cp, W and G the
bytes of the rank's weights and gradients, L its layers:

    tp   m L (4 + 2r) 2 (tp-1)/tp 2tC       dp   (n-1)/n x   ddp 2G, zero1 G + W, fsdp G + 2mW
    cp   m L (3 + r) (cp-1) 4t C_kv/tp                       (kept: G + W)
    pp   m 2 chunks tC bytes(hidden), with sp 1/tp
    ep   m L_E ((4 + 2r) 2 k t C + (1 + r) 4 E) (ep-1)/ep, of L_E layers with E experts, k of a
         token: parallel/expert.py where loads are even. An expert's W and G count (n-ep)/n

Step time = m x one x (1 + bubble) + what is left over of the dp traffic:

    one      compute + tp + cp + pp traffic of the slowest stage, none of it overlapped
    compute  FLOPs / peak x (LIMIT + peak/memory bandwidth x (1/t + tp/C + PASSES/C)): a roofline
             whose two times add, of matmuls t x C by C x C/tp, and of PASSES readings of the hidden
             states beside them. Of experts t is the rows of one, k t ep/E, and C the width, if less
    FLOPs    3 + r forwards; attention is counted half where a kernel skips what is masked, as ours
    traffic  bytes / (REACHED x the link's bandwidth); within a node it is the node's. Of ep's
             bytes those to ranks of the same node
    overlap  gradients go while the last backward computes (2/3 of one), fsdp's gathers all the
             time: of the shorter of the two the share HIDDEN is saved; zero1's gather is not
    bubble   1f1b (pp-1)/m; interleaved (pp-1)/(m chunks); zero-bubble H1 (1+r)/(3+r) of 1f1b's

Not in it: the optimizer's step, latency, stragglers, failures, data. MFU is as in metrics/flops.py.
Against published runs (layouts and sources: tests/test_plan.py), MFU published, predicted, ratio; a
* marks the five rows that LIMIT, PASSES, REACHED and HIDDEN were fitted to. The others were not,
but the overlap rule got its form with the Z3 rows in view, and Llama 3's 8 chunks a rank are our
reading of its 126 = 8 x 16 - 2 layers.

    SC21 1.7B*    0.335 0.339 1.01  SC21 3.6B     0.335 0.342 1.02  SC21 7.5B     0.344 0.331 0.96
    SC21 18.4B*   0.326 0.327 1.00  SC21 39.1B    0.333 0.332 1.00  SC21 76.1B    0.337 0.360 1.07
    SC21 145.6B   0.356 0.366 1.03  SC21 310.1B   0.373 0.386 1.04  SC21 529.6B*  0.392 0.396 1.01
    SC21 1008B    0.392 0.382 0.97  Z3 175B 384*  0.346 0.342 0.99  Z3 175B 768   0.212 0.219 1.03
    Z3 175B 1536* 0.106 0.109 1.03  Z3 530B 640   0.332 0.351 1.06  Z3 530B 1120  0.236 0.217 0.92
    Z3 530B 2240  0.115 0.108 0.94  PTD 175B 384  0.368 0.377 1.02  PTD 175B 768  0.358 0.365 1.02
    PTD 175B 1536 0.339 0.343 1.01  PTD 530B 560  0.411 0.409 0.99  PTD 530B 1120 0.402 0.396 0.99
    PTD 530B 2240 0.382 0.373 0.98  K22 22B       0.415 0.446 1.07  K22 175B      0.514 0.501 0.98
    K22 530B      0.560 0.523 0.93  K22 1T        0.563 0.502 0.89  L3 8192 cp1   0.435 0.448 1.03
    L3 16384 cp1  0.404 0.418 1.03  L3 16384 cp16 0.384 0.404 1.05

SC21 is Narayanan et al. 2021 (2104.04473), table 1; Z3 and PTD its table 2; K22 Korthikanti et al.
2022 (2205.05198); L3 Llama 3 (2407.21783). SC21 counts recomputation as work (96 B s l h^2 ...):
its 44 to 52 % of peak is HFU, 3/4 of it is above. L3 cp16 has sequences of 131072 tokens and half
of attention is counted here; all of it, as PaLM does, would make 0.57 of the same step. Its report
does not say which.

Runs with experts, to which nothing was fitted. Published MFU, predicted, ratio, and the ratio if
links cost no time:

    DS-V3 fp8       0.224 0.104 0.47 1.24
    DS-V3 bf16      0.448 0.183 0.41 0.91
    MPF 8x22B       0.463 0.397 0.86 1.03
    MPF 8x22B G8T8  0.171 0.119 0.69 1.97
    MPF 57B-A14B    0.353 0.275 0.78 0.96

DS-V3 is DeepSeek-V3 (2412.19437): 180K H800 hours for 1T tokens, 1543 a second on each of 2048;
16 stages, 64-way ep over 8 nodes, ZeRO-1, 15360 sequences of 4096 tokens. Only products are in FP8,
so it is here over FP8's peak, and over bfloat16's. What differs from our prediction: DualPipe hides
all its messages, as in the last column (our schedule is zero-bubble). A token goes to at most 4
nodes, in FP8; we send 8 rows in bfloat16. A layer of multi-latent attention has 187M weights; 128
heads with one head of keys have 237M, and with fewer FLOPs in the scores 5 % more in all. Its first
three layers are dense, as wide as 9 experts: with experts they have the same FLOPs, and the model
5 % more weights. The head for the second next token is left out. Published MFU is that of our
stand-in at the published tokens a second.

MPF is Liu et al. 2025 (2504.14960), table 3: MCore without folding (so ep is inside dp, as ours) on
H100s, 256 sequences of 4096 tokens in bfloat16. Micro-batches of 1, and a layer a chunk, are our
reading. It drops tokens beyond an expert's even share. Each tensor parallel rank of ours sends all
rows, where with sequence parallelism 1/tp would do: twice the messages here.

Neighbours: memory/estimate.py, memory/flags.py, optim/adamw.py, optim/attributes.py, optim/muon.py,
parallel/replicas.py, precision/amp.py

Example:
    from memory.plan import GPUS, Cluster, Layout, Model, predict
    model = Model(n_layer=32, n_embd=4096, n_head=32, n_kv_head=32)  # 6.9e9 parameters
    cluster = Cluster(64, *GPUS["A100"])
    plan = predict(model, cluster, Layout(data_parallel="fsdp"), batch=512)
    print(f"{plan.step:.1f} s a step, MFU {plan.mfu:.0%}, {plan.held['total'] / 1e9:.0f} GB")
    assert plan.held["total"] < cluster.memory
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from memory.estimate import (
    GATED,
    NAMES,
    OF_EXPERTS,
    Experts,
    Shapes,
    activation_bytes,
    bytes_of,
    bytes_per_rank,
    check_experts,
    gpt_shapes,
    mlp_size,
)
from memory.flags import check, from_text, usage, words

# Fitted once to published runs, see above.
LIMIT = 1.34
PASSES = 11
REACHED = 0.65
HIDDEN = 0.6
# --loss_chunk=auto on a GPU, for a vocabulary of 8192 words or more.
LOSS_CHUNK = 4096
# The share of a device's memory that a plan fills. The rest is for the context, communication
# buffers and fragmentation.
USABLE = 0.9


@dataclass(frozen=True)
class Model:
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    vocab_size: int = 50304
    block_size: int = 2048
    # Entries of a block's MLP matrices in n_embd^2, for FLOPs; None: those of arch and mlp_width,
    # which memory counts in any case.
    mlp: float | None = None
    arch: str = "modern"
    head_dim: int | None = None
    mlp_width: int | None = None
    experts: Experts | None = None

    @property
    def q_width(self) -> int:
        """The width of all heads of queries."""
        return self.n_head * (self.head_dim or self.n_embd // self.n_head)

    @property
    def kv_width(self) -> int:
        """The width of all heads of keys."""
        return self.q_width // self.n_head * self.n_kv_head

    @property
    def attention(self) -> int:
        """Entries of a block's matrices of attention."""
        return 2 * (self.q_width + self.kv_width) * self.n_embd

    @property
    def block(self) -> float:
        """Entries of a block's matrices, where it has no experts."""
        C = self.n_embd
        if self.mlp is not None:
            return self.attention + self.mlp * C**2
        return self.attention + self.matrices * C * mlp_size(C, self.arch, self.mlp_width)

    @property
    def matrices(self) -> int:
        """Of an MLP, or an expert."""
        return 3 if self.arch in GATED else 2

    @property
    def expert_width(self) -> int:
        return self.experts.width(self.n_embd, self.arch, self.mlp_width)

    @property
    def expert(self) -> int:
        """Entries of an expert's matrices."""
        return self.matrices * self.n_embd * self.expert_width if self.experts else 0

    @property
    def around_experts(self) -> int:
        """Entries of what all tokens go through in a block with experts."""
        x = self.experts
        return self.attention + x.n_expert * self.n_embd + x.n_shared_expert * self.expert

    def split(self, layers: range) -> tuple[int, int]:
        """How many of these layers have no experts, and how many have."""
        n_sparse = sum(self.experts.are_in(i) for i in layers) if self.experts else 0
        return len(layers) - n_sparse, n_sparse

    def entries(self, layers: range, n_expert: int) -> float:
        """Of the matrices in these layers, with so many experts in each that has any."""
        n_dense, n_sparse = self.split(layers)
        count = n_dense * self.block
        return (
            count + n_sparse * (self.around_experts + n_expert * self.expert) if n_sparse else count
        )

    @property
    def parameters(self) -> float:
        n_vocabulary = 1 if self.arch == "gpt2" else 2  # whose head is its embedding
        everything = self.entries(range(self.n_layer), self.experts.n_expert if self.experts else 0)
        return everything + n_vocabulary * self.vocab_size * self.n_embd

    @property
    def active(self) -> float:
        """Entries of the matrices that a token is multiplied with."""
        n_active = self.experts.n_expert_active if self.experts else 0
        return self.entries(range(self.n_layer), n_active) + self.vocab_size * self.n_embd

    @property
    def flops(self) -> float:
        """FLOPs of a token, forward and backward: 6 N + 12 L C T."""
        return 6 * self.active + 12 * self.n_layer * self.q_width * self.block_size


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes/s, one way."""

    gpus: int
    peak_flops: float = 312e12
    memory: float = 80e9
    memory_bandwidth: float = 2.039e12
    node_bandwidth: float = 300e9
    bandwidth: float = 25e9
    gpus_per_node: int = 8


# From NVIDIA's data sheets (SXM; NVLink's 600 and 900 GB/s are both ways) and DGX: 8 x 200 or 400
# Gb/s a node. In the order of Cluster's fields.
GPUS = {
    "A100": (312e12, 80e9, 2.039e12, 300e9, 25e9),
    "H100": (989.5e12, 80e9, 3.35e12, 450e9, 50e9),
    "H200": (989.5e12, 141e9, 4.8e12, 450e9, 50e9),
    # An H100 whose NVLink has 400 GB/s both ways. DeepSeek-V3's report (2412.19437, section 3.2.2)
    # gives its NVLink 160 GB/s, and InfiniBand 50.
    "H800": (989.5e12, 80e9, 3.35e12, 200e9, 50e9),
}


@dataclass(frozen=True)
class Layout:
    """Fields are named as train.py's flags. activation_checkpoint is none, full or every_K."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    ep: int = 1
    pp_schedule: str = "1f1b"
    pp_chunks: int = 1
    data_parallel: str = "ddp"
    reshard: bool = True
    # Or selective, for published rows: attention's s^2 alone.
    activation_checkpoint: str = "none"
    micro_batch_size: int = 1


@dataclass(frozen=True)
class Plan:
    layout: Layout
    held: dict[str, float]  # bytes on the fullest rank
    node_bytes: float  # sent by a rank in a step, inside its node and to others
    net_bytes: float
    idle: float  # share of the step
    step: float  # seconds
    mfu: float


def recomputed(x: Layout) -> float:
    """The share of blocks that backward computes again."""
    kind = x.activation_checkpoint
    if kind.startswith("every_"):
        return 1 / int(kind[6:])
    return float(kind == "full")


# ---- memory --------------------------------------------------------------------------------------
def in_flight(x: Layout, micro: int, last: bool = False) -> float:
    """Micro-batches whose activations the first (or last) stage holds at once.

    micro: micro-batches of a step.
    """
    if x.pp_schedule == "interleaved":
        # The first stage holds more than pp, the last one as many fewer.
        extra = (x.pp - 1) / x.pp_chunks
        most = x.pp - extra if last else x.pp + extra
    elif x.pp_schedule == "1f1b" and last:
        most = 1
    else:
        most = x.pp
    return min(micro, most)


def activations(m: Model, x: Layout, micro: int, precision: str) -> float:
    """Bytes of activations on the fullest stage."""
    C = m.n_embd
    again = recomputed(x)
    layers = math.ceil(m.n_layer / x.pp)
    tokens = x.micro_batch_size
    tokens *= m.block_size / x.cp
    # Sequence parallelism shares out all activations, tensor parallelism those inside a block.
    if x.sp:
        share = 1 / x.tp
        shards_of_input = x.tp
    else:
        share = 10 / 34 + 24 / 34 / x.tp
        shards_of_input = 1
    forward = functools.partial(activation_bytes, precision, tokens, in_backward=False)
    widths = dict(arch=m.arch, q_width=m.q_width, kv_width=m.kv_width, mlp_width=m.mlp_width)
    block = forward(1, C, **widths) * share
    stage = forward(layers, C, **widths) * share
    n_sparse = m.split(fullest_stage(m, x.pp))[1]
    if n_sparse:
        dense = block
        block = sparse_block(m, x, tokens, precision, share)
        stage += n_sparse * (block - dense)
    stage *= 1 - again
    # Of a block that is computed again only the input is kept.
    stage += again * layers * tokens * C * bytes_of(precision)[0] / shards_of_input
    loss_chunk = LOSS_CHUNK if m.vocab_size >= 8192 else None
    head = forward(0, 0, m.vocab_size, loss_chunk=loss_chunk) / x.tp
    first = in_flight(x, micro) * stage
    if x.pp == 1:
        first += head
    last = in_flight(x, micro, True) * stage + head
    fullest = max(first, last)
    if again > 0:
        fullest += block
    return fullest


def sparse_block(m: Model, x: Layout, tokens: float, precision: str, share: float) -> float:
    """Bytes of activations of a block with experts, of which tp leaves this share of a block."""
    experts = replace(m.experts, moe_every=1, ep=x.ep)
    everything = activation_bytes(
        # Those who count 34 bytes a channel know no experts.
        "bf16" if precision == "mixed" else precision,
        tokens,
        1,
        m.n_embd,
        arch=m.arch,
        in_backward=False,
        q_width=m.q_width,
        kv_width=m.kv_width,
        mlp_width=m.mlp_width,
        experts=experts,
    )
    # Rows go whole to every tensor parallel rank: the results, and what came from other ranks.
    rows = 2 * (1 + (x.ep > 1)) * experts.rows(tokens) * m.n_embd
    return (everything - rows) * share + rows


def fullest_stage(m: Model, pp: int) -> range:
    """The layers of the stage with the most experts; all stages but the last are full."""
    size = math.ceil(m.n_layer / pp)
    stages = [range(i, min(i + size, m.n_layer)) for i in range(0, m.n_layer, size)]
    return max(stages, key=lambda layers: (m.split(layers)[1], len(layers)))


@functools.lru_cache(4096)
def stage_shapes(m: Model, tp: int, pp: int, ep: int = 1) -> Shapes:
    """The parameters of the largest stage on one tensor parallel rank.

    The first and the last stage hold equally much: one has the embedding, the other has the head.
    Several experts on a rank are one parameter here, of no more rows than there are words.
    """
    few = None if m.experts is None else replace(m.experts, n_expert=1)
    full = gpt_shapes(
        m.n_layer,
        m.n_embd,
        m.vocab_size,
        m.block_size,
        m.arch,
        m.n_head,
        m.n_kv_head,
        m.head_dim,
        m.mlp_width,
        experts=few,
    )
    here = fullest_stage(m, pp)
    together = 1
    if m.experts is not None:
        on_rank = m.experts.n_expert // ep
        most = max(1, m.vocab_size // m.expert_width)
        together = max(n for n in range(1, on_rank + 1) if on_rank % n == 0 and n <= most)
    shapes = {}
    for name, (kind, (rows, *others)) in full.items():
        if name.startswith("blocks.") and int(name.split(".")[1]) not in here:
            continue
        if pp > 1 and kind == "head":
            continue
        if ".router." in name:
            shapes[name] = kind, (m.experts.n_expert, *others)
            continue
        before, experts, after = name.partition(".experts.0.")
        if not experts:
            shapes[name] = kind, (math.ceil(rows / tp), *others)
            continue
        for e in range(m.experts.n_expert // together):
            its_shape = math.ceil(rows * together / tp), *others
            shapes[f"{before}.experts.{e}.{after}"] = kind, its_shape
    return shapes


@functools.lru_cache(4096)
def weights_and_state(
    m: Model,
    tp: int,
    pp: int,
    n: int,
    layout: str,
    reshard: bool,
    several: bool,
    precision: str,
    ep: int = 1,
) -> dict[str, float]:
    return bytes_per_rank(
        stage_shapes(m, tp, pp, ep),
        "adamw",
        layout,
        n,
        precision,
        ep=ep,
        reshard=reshard,
        # Only whether there are several matters, so plans share cached results.
        micro_batches=1 + several,
    )


def held_bytes(m: Model, x: Layout, n: int, micro: int, precision: str) -> dict[str, float]:
    """What memory/estimate.py returns, for one of n replicas of `micro` micro-batches each."""
    held = weights_and_state(
        m, x.tp, x.pp, n, x.data_parallel, x.reshard, micro > 1, precision, x.ep
    )
    held = held | dict(activations=activations(m, x, micro, precision))
    # The loss's backward holds two float32 numbers for each logit, before the gradients of one
    # micro-batch are there.
    at_loss = 8 * x.micro_batch_size * m.block_size / x.cp * m.vocab_size / x.tp
    if micro == 1:
        at_loss = max(0, at_loss - held["gradients"])
    held["buffers"] += at_loss
    held["total"] += held["activations"] + at_loss
    return held


# ---- time ----------------------------------------------------------------------------------------
def predict(
    m: Model, c: Cluster, x: Layout, batch: int, precision: str = "bf16", causal: float = 0.5
) -> Plan:
    """Memory, traffic and time of layout x on cluster c with `batch` sequences a step.

    causal: share of attention that is computed, 1 where a kernel masks instead of skipping.
    """
    n = c.gpus // (x.tp * x.pp)  # replicas, dp cp
    again = recomputed(x)
    micro = batch * x.cp // (n * x.micro_batch_size)  # micro-batches of a step
    tokens = x.micro_batch_size * m.block_size / x.cp  # of a micro-batch, on a rank
    weight, gradient, *_ = bytes_of(precision)

    held = held_bytes(m, x, n, micro, precision)

    # One micro-batch, forward and backward, and its traffic, none of it overlapped.
    one = compute_seconds(m, c, x, tokens, causal)
    sent = sent_bytes(m, c, x, tokens, weight)
    inside = is_inside(c, x)
    speed = {}
    for axis, in_node in inside.items():
        speed[axis] = REACHED * (c.node_bandwidth if in_node else c.bandwidth)
    one += sum(sent[axis] / speed[axis] for axis in sent)

    # Data parallel: the last backward hides some of the reduction, fsdp's gathers hide all along.
    n_passes = 2 if x.data_parallel == "ddp" else 1  # all-reduce, or reduce-scatter
    share = summed_entries(m, x, n)
    reduced = share * gradient * n_passes
    gather = share * weight / speed["dp"]
    after = together(reduced / speed["dp"], one * 2 / 3) - one * 2 / 3
    gathers = 1
    if x.data_parallel == "fsdp" and x.reshard:
        one = together(one, 2 * gather)
        gathers = 2 * micro
    elif x.data_parallel == "fsdp":
        # Weights that are kept are gathered once, under the first forward: a third of `one`.
        after += together(gather, one / 3) - one / 3
    elif x.data_parallel == "zero1":
        after += gather
    else:
        gathers = 0

    # 1f1b idles for (pp-1) (3 + r) forwards. H1 fills 2 (pp-1) of them with weights' gradients.
    rate = {"1f1b": 1, "interleaved": 1 / x.pp_chunks, "zerobubble": (1 + again) / (3 + again)}
    bubble = (x.pp - 1) / micro * rate[x.pp_schedule]
    step = micro * one * (1 + bubble) + after
    traffic = {axis: micro * size for axis, size in sent.items()}
    traffic["dp"] = reduced + gathers * share * weight
    node_bytes = sum(size for axis, size in traffic.items() if inside[axis])
    return Plan(
        layout=x,
        held=held,
        node_bytes=node_bytes,
        net_bytes=sum(traffic.values()) - node_bytes,
        idle=micro * one * bubble / step,
        step=step,
        mfu=batch * m.block_size * m.flops / (step * c.gpus * c.peak_flops),
    )


def compute_seconds(m: Model, c: Cluster, x: Layout, tokens: float, causal: float) -> float:
    """Of one micro-batch, forward and backward, on the slowest stage."""
    C = m.n_embd
    passes = 3 + recomputed(x)
    attention = 4 * m.q_width * m.block_size * causal  # a token's FLOPs forward, in a block
    selective = attention if x.activation_checkpoint == "selective" else 0

    def cost(rows: float, side: int) -> float:
        """Seconds over those at the peak, of matmuls rows x side by side x side/tp."""
        slow = 1 / rows + x.tp / side + PASSES / side
        return LIMIT + c.peak_flops / c.memory_bandwidth * slow

    def of_layers(layers: range, head: float = 0) -> float:
        n_dense, n_sparse = m.split(layers)
        total = head + n_dense * (passes * (2 * m.block + attention) + selective)
        if n_sparse:
            total += n_sparse * (passes * (2 * m.around_experts + attention) + selective)
        total *= cost(tokens, C)
        if n_sparse:
            # Loads are taken as even, and an expert's rows come from all ranks of an ep group.
            k = m.experts.n_expert_active
            rows = k * tokens * x.ep / m.experts.n_expert
            of_experts = n_sparse * passes * 2 * k * m.expert
            total += of_experts * cost(rows, min(C, m.expert_width))
        return total

    # The last stage has the head, but perhaps a layer fewer.
    last = range(m.n_layer - m.n_layer // x.pp, m.n_layer)
    slowest = max(of_layers(fullest_stage(m, x.pp)), of_layers(last, 6 * m.vocab_size * C))
    return slowest * tokens / x.tp / c.peak_flops


def sent_bytes(m: Model, c: Cluster, x: Layout, tokens: float, weight: int) -> dict[str, float]:
    """What a rank sends in one micro-batch, along each axis."""
    C = m.n_embd
    again = recomputed(x)
    here = fullest_stage(m, x.pp)
    sent = {
        "tp": len(here) * (4 + 2 * again) * 2 * (x.tp - 1) / x.tp * tokens * C * 2,
        "cp": len(here) * (3 + again) * (x.cp - 1) * 4 * tokens * m.kv_width / x.tp,
        "pp": 0,
    }
    if x.pp > 1:
        sent["pp"] = 2 * x.pp_chunks * tokens * C * weight / (x.tp if x.sp else 1)
    if x.ep > 1:
        rows = (4 + 2 * again) * m.experts.n_expert_active * tokens * C * 2
        counts = (1 + again) * 4 * m.experts.n_expert
        both = m.split(here)[1] * (rows + counts)
        # Of an ep group's ranks some are on this node, and each gets an equal share.
        on_node = min(x.ep, max(1, c.gpus_per_node // (x.tp * x.cp)))
        sent["ep"] = both * (on_node - 1) / x.ep
        sent["ep others"] = both * (x.ep - on_node) / x.ep
    return sent


def is_inside(c: Cluster, x: Layout) -> dict[str, bool]:
    """Has what is sent along an axis the links inside a node? Where the group is in one."""
    spans = {"tp": x.tp, "cp": x.tp * x.cp, "dp": c.gpus // x.pp, "pp": c.gpus}  # ranks
    inside = {axis: span <= c.gpus_per_node for axis, span in spans.items()}
    return inside | {"ep": True, "ep others": False}


def summed_entries(m: Model, x: Layout, n: int) -> float:
    """Of a rank's weights: how many numbers it sends when they are gathered, or reduced.

    Of each that n replicas hold (n - 1)/n; of experts n/ep replicas hold the same.
    """
    here = fullest_stage(m, x.pp)
    n_vocabulary = 2 if x.pp == 1 else 1  # embedding and head, on one stage or on two
    all_hold = m.entries(here, 0) + m.vocab_size * m.n_embd * n_vocabulary
    total = (n - 1) / n * all_hold
    if m.experts is not None:
        experts = m.split(here)[1] * m.experts.n_expert * m.expert / x.ep
        total += (n - x.ep) / n * experts
    return total / x.tp


def together(a: float, b: float) -> float:
    """Seconds of two things at the same time: some of the shorter one is hidden."""
    return a + b - HIDDEN * min(a, b)


# ---- the search ----------------------------------------------------------------------------------
def grids(m: Model, c: Cluster, batch: int) -> Iterator[tuple[int, int, int]]:
    """(pp, cp, tp) that the model, the cluster and the batch divide by."""
    # tp splits each of these evenly, and a node holds whole tp groups.
    widths = []
    if m.split(range(m.n_layer))[0]:
        widths.append(mlp_size(m.n_embd, m.arch, m.mlp_width))
    if m.experts is not None:
        widths.append(m.expert_width)
    split = (m.n_head, m.n_kv_head, m.n_embd, *widths, m.vocab_size, c.gpus_per_node)
    tps = [tp for tp in range(1, c.gpus_per_node + 1) if not any(size % tp for size in split)]
    cps = [cp for cp in (1, 2, 4, 8, 16, 32, 64) if cp == 1 or m.block_size % (2 * cp) == 0]
    pps = [pp for pp in range(1, min(m.n_layer, c.gpus) + 1) if c.gpus % pp == 0]
    for pp, cp, tp in itertools.product(pps, cps, tps):
        size = pp * cp * tp
        if c.gpus % size == 0 and batch % (c.gpus // size) == 0:
            yield pp, cp, tp


def layouts(m: Model, c: Cluster, batch: int) -> Iterator[Layout]:
    """Layouts that train.py would start.

    Left out: zero2 and zero3 (fsdp composes with everything), naive and gpipe (1f1b's time at
    best), micro-batches above 16, hybrids; K is 2, chunks are 2, 3, 4 or 8.
    """
    for pp, cp, tp in grids(m, c, batch):
        dp = c.gpus // (pp * cp * tp)
        sp = tp > 1 and m.block_size // cp % tp == 0
        kinds = [("ddp", True)]
        if dp * cp > 1:
            kinds += [("zero1", True), ("fsdp", True), ("fsdp", False)]
        n_expert = m.experts.n_expert if m.experts else 1
        eps = [ep for ep in range(1, min(dp, n_expert) + 1) if dp % ep == n_expert % ep == 0]
        choices = itertools.product(eps, kinds, ("none", "every_2", "full"), (1, 2, 4, 8, 16))
        for ep, (kind, reshard), again, size in choices:
            micro, rest = divmod(batch // dp, size)
            if rest or not micro:
                continue
            x = Layout(tp, sp, cp, pp, ep, "1f1b", 1, kind, reshard, again, size)
            yield x
            # Zero bubble is incompatible with fsdp and with activation checkpointing.
            if pp > 1 and kind != "fsdp" and again == "none":
                yield replace(x, pp_schedule="zerobubble")
            if pp > 1 and micro % pp == 0:
                for chunks in (2, 3, 4, 8):
                    if chunks * pp <= m.n_layer:
                        yield replace(x, pp_schedule="interleaved", pp_chunks=chunks)


def plans(m: Model, c: Cluster, batch: int, precision: str = "bf16") -> list[Plan]:
    """The plans that fit, the fastest first (to three digits; among equals the simplest).

    Raises ValueError, with what to type, where none fits.
    """
    smallest = None  # of those that do not fit
    fits = []
    for x in layouts(m, c, batch):
        plan = predict(m, c, x, batch, precision)
        if plan.held["total"] <= USABLE * c.memory:
            fits.append(plan)
        elif smallest is None or plan.held["total"] < smallest.held["total"]:
            smallest = plan
    if not fits and smallest is None:
        raise ValueError(
            f"no layout shares batch={batch} sequences out over gpus={c.gpus}; "
            f"give a multiple, as --batch={c.gpus * math.ceil(batch / c.gpus)}"
        )
    if not fits:
        least = smallest.held["total"] / USABLE / 1e9
        raise ValueError(
            f"nothing fits in memory={c.memory:g}; the least is --memory={least:.1f}e9, with "
            f"{flags(m, smallest.layout, batch)}; or more --gpus, a smaller --block_size"
        )

    def order(plan: Plan) -> tuple:
        # Steps equal to three digits tie: then the fewest flags to type, then the least memory.
        default = vars(Layout())
        n_changed = sum(getattr(plan.layout, name) != usual for name, usual in default.items())
        return float(f"{plan.step:.3g}"), n_changed, plan.held["total"]

    return sorted(fits, key=order)


def flags(m: Model, x: Layout, batch: int) -> str:
    """The layout in train.py's command line: what differs from its defaults, and the batch."""
    typed = {k: v for k, v in vars(x).items() if v != getattr(Layout(), k)}
    if x.cp > 1:
        typed["cp_attention"] = "ring"
    if x.pp > 1:
        typed["pp_schedule"] = x.pp_schedule
    typed |= dict(micro_batch_size=x.micro_batch_size, batch_size=batch, block_size=m.block_size)
    return " ".join(f"--{k}={str(v).lower()}" for k, v in typed.items())


# ---- the command ---------------------------------------------------------------------------------
FLAGS = dict(
    params=None,
    n_layer=None,
    n_embd=None,
    n_head=None,
    n_kv_head=None,
    arch="modern",
    head_dim=None,
    mlp_width=None,
    n_expert=None,
    n_expert_active=2,
    n_shared_expert=0,
    expert_width=None,
    moe_every=1,
    vocab_size=50304,
    block_size=2048,
    gpus=8,
    gpus_per_node=8,
    gpu="A100",
    memory=None,
    peak_flops=None,
    memory_bandwidth=None,
    bandwidth=None,
    node_bandwidth=None,
    batch=None,
    batch_tokens=None,
    precision="bf16",
    top=8,
)
# mixed is 2 + 2 + 12 bytes, which train.py does not offer.
WORDS = {"gpu": GPUS, "precision": ("bf16", "mixed"), "arch": NAMES["arch"]}
# Heading of a column -> key of Plan.held.
HELD = dict(
    weights="parameters",
    grads="gradients",
    state="state",
    activ="activations",
    buffers="buffers",
    total="total",
)

# A line for each column of the table.
LEGEND = """\
s/step       predicted seconds of a step. Rows are sorted by it; equal in three digits, the layout
             with fewer flags comes first, then the one with less memory
MFU          share of the GPUs' peak that the model's FLOPs use (metrics/flops.py)
idle         share of the step in which a pipeline stage waits
tp           ranks that split each matrix; s: the tokens between the matrices too (--sp=true)
cp           ranks that split each sequence
pp           ranks that split the layers
ep           data-parallel ranks that share out the experts
schedule     order of the pipeline's work, and model chunks on each rank
checkpoint   what backward computes again (--activation_checkpoint)
data         --data_parallel; kept: weights are gathered once a step (--reshard=false)
micro        sequences in a forward of a rank (--micro_batch_size)
weights      GB (1e9 bytes) of parameters on the fullest rank
grads        GB of gradients there
state        GB of optimizer state there
activ        GB of activations there, of all micro-batches in flight
buffers      GB of messages, gathered weights and temporary copies there
total        GB of all five
inside       GB that a rank sends in a step to ranks of its own node
others       GB that it sends to other nodes""".splitlines()


def parse(argv: list[str]) -> dict:
    """--name=value ... -> the settings. Raises ValueError."""
    found = dict(FLAGS)
    for name, text in words(argv):
        check("the name", name, FLAGS)
        # Without a list of words any text passes here, and from_text judges it.
        check(name, text, WORDS.get(name, (text,)))
        found[name] = text if name in WORDS else from_text(name, text, None)
    check_experts(found)
    return found


def guess(params: float, vocab_size: int, block_size: int) -> Model:
    """A usual shape for so many parameters: heads of 128, about 128 channels a layer.

    From 12 L C^2 = params. C is a multiple of 1024 from 768 on. L follows from C, and is a multiple
    of 4 from 32 on.
    """
    C = 128 * (params / 12 / 128**2) ** (1 / 3)
    grain = 1024 if C >= 768 else 128
    C = max(1, round(C / grain)) * grain
    L = (params - 2 * vocab_size * C) / (12 * C**2)
    L = 4 * round(L / 4) if L >= 32 else round(L)
    L = max(1, L)
    return Model(L, C, C // 128, C // 128, vocab_size, block_size)


def requested(s: dict) -> tuple[Model, Cluster, int]:
    """(model, cluster, sequences a step) of the command line. Raises ValueError."""
    if s["params"]:
        m = guess(s["params"], s["vocab_size"], s["block_size"])
    elif s["n_layer"] and s["n_embd"]:
        heads = s["n_head"] or max(1, s["n_embd"] // 128)
        m = Model(
            s["n_layer"],
            s["n_embd"],
            heads,
            s["n_kv_head"] or heads,
            s["vocab_size"],
            s["block_size"],
        )
    else:
        raise ValueError(
            "type --params=70e9, or the model's --n_layer=80 --n_embd=8192 --n_head=64"
        )
    m = replace(m, arch=s["arch"], head_dim=s["head_dim"], mlp_width=s["mlp_width"])
    if s["n_expert"]:
        m = replace(m, experts=Experts(s["n_expert"], **{name: s[name] for name in OF_EXPERTS}))
    if (m.head_dim is None and m.n_embd % m.n_head) or m.n_head % m.n_kv_head:
        raise ValueError(
            f"n_embd={m.n_embd}, n_head={m.n_head}, n_kv_head={m.n_kv_head}: each "
            "must divide the one before"
        )
    if s["gpus"] > s["gpus_per_node"] and s["gpus"] % s["gpus_per_node"]:
        raise ValueError(
            f"gpus={s['gpus']} is not whole nodes of gpus_per_node={s['gpus_per_node']}"
        )
    names = ("peak_flops", "memory", "memory_bandwidth", "node_bandwidth", "bandwidth")
    own = {name: s[name] or usual for name, usual in zip(names, GPUS[s["gpu"]])}
    c = Cluster(s["gpus"], **own, gpus_per_node=s["gpus_per_node"])
    tokens = s["batch_tokens"] or 2**22
    return m, c, s["batch"] or max(1, round(tokens / m.block_size))


def table(s: dict) -> str:
    """The best plans, and what to type for the first. Raises ValueError."""
    m, c, batch = requested(s)
    found = plans(m, c, batch, s["precision"])
    active = f", {m.active / 1e9:.4g}e9 of them active" if m.experts else ""
    lines = [
        f"{m.parameters / 1e9:.4g}e9 parameters{active} (n_layer={m.n_layer} n_embd={m.n_embd}"
        f" n_head={m.n_head} n_kv_head={m.n_kv_head} vocab_size={m.vocab_size}), AdamW,"
        f" {s['precision']}; {batch} x {m.block_size} tokens a step on {c.gpus} GPUs",
        f"{len(found)} layouts fit in {USABLE} of {c.memory / 1e9:g} GB; the fastest:",
        "",
        "    s/step   MFU  idle   tp cp  pp  ep schedule      checkpoint data            micro  "
        + "".join(f"{k:>8}" for k in HELD)
        + "  inside  others",
    ]
    lines += [table_row(plan) for plan in found[: s["top"]]]
    lines += ["", *LEGEND, "", "The first row, typed on each node:"]
    lines += [command(m, c, found[0].layout, batch, s["precision"])]
    if s["precision"] == "mixed":
        lines.append("(--precision=mixed is the papers' accounting; train.py has bf16)")
    return "\n".join(lines)


def table_row(p: Plan) -> str:
    x = p.layout
    schedule = "-"
    if x.pp > 1:
        chunks = x.pp_chunks if x.pp_chunks > 1 else ""
        schedule = f"{x.pp_schedule} {chunks}"
    data = x.data_parallel
    if not x.reshard:
        data += ", kept"
    sp = "s" if x.sp else " "
    return (
        f"{p.step:10.4g} {p.mfu:5.1%} {p.idle:5.1%} {x.tp:2}{sp} {x.cp:2}"
        f" {x.pp:3} {x.ep:3} {schedule:13} {x.activation_checkpoint:10} {data:15}"
        f" {x.micro_batch_size:5}  "
        + "".join(f"{p.held[k] / 1e9:8.2f}" for k in HELD.values())
        + f"{p.node_bytes / 1e9:8.1f}{p.net_bytes / 1e9:8.1f}"
    )


def command(m: Model, c: Cluster, x: Layout, batch: int, precision: str) -> str:
    """What to type on each node to train with this layout."""
    start = "python"
    nodes = math.ceil(c.gpus / c.gpus_per_node)
    if c.gpus > 1:
        start = f"torchrun --nnodes={nodes} --nproc_per_node={c.gpus // nodes}"
    if nodes > 1:
        start += " --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    shape = {name: getattr(m, name) for name in ("n_layer", "n_embd", "n_head", "n_kv_head")}
    for name in ("arch", "head_dim", "mlp_width"):
        if getattr(m, name) != FLAGS[name]:
            shape[name] = getattr(m, name)
    if m.experts is not None:
        of_experts = {name: getattr(m.experts, name) for name in ("n_expert", *OF_EXPERTS)}
        shape |= {name: value for name, value in of_experts.items() if value != FLAGS[name]}
    shape["vocab_size"] = m.vocab_size
    shape = " ".join(f"--{name}={value}" for name, value in shape.items())
    layout = flags(m, x, batch)
    return f"{start} train.py {shape} --optim=adamw --precision={precision} {layout}"


# ---- what the course texts claim -----------------------------------------------------------------
def fastest(m: Model, gpus: int, batch: int) -> tuple[float, float]:
    """Sequences of a GPU-hour, and MFU, of the fastest layout on A100s."""
    plan = plans(m, Cluster(gpus, *GPUS["A100"]), batch)[0]
    return batch / plan.step / gpus * 3600, plan.mfu


def bert_runs() -> Iterator[tuple]:
    """(run, the text's figure, ours, text / ours or None, MFU, verdict) of each claim.

    gpt_runs and later_runs yield the same.
    """
    # The average length: 90 % of the steps have sequences of 128 tokens, the rest have 512 (Devlin
    # et al. 2018).
    tokens = 0.9 * 128 + 0.1 * 512
    run = "BERT-Base, 16 GPUs, 256 x 1M steps"
    verdict = "wrong: 16 TPU chips of 2018, no GPUs"
    rate, mfu = fastest(Model(12, 768, 12, 12, 30522, 128), 16, 256)
    days = 256e6 * tokens / 128 / rate / 16 / 24
    yield run, "4 days", f"{days:.2f} days", 4 / days, mfu, verdict
    run = "BERT-Large, LAMB, 16K (16 GPUs)"
    verdict = "wrong: 3 days was the baseline, LAMB took 76 minutes (You et al. 2020)"
    rate, mfu = fastest(Model(24, 1024, 16, 16, 30522, 128), 16, 16384)
    days = 512e6 * tokens / 128 / rate / 16 / 24
    yield run, "3 days", f"{days:.2f} days", 3 / days, mfu, verdict


def gpt_runs() -> Iterator[tuple]:
    run = "GPT-2 1.5B, 64 GPUs, 0.5M tokens a step"
    verdict = "no tokens given: a week is WebText (9e9) many times over"
    rate, mfu = fastest(Model(48, 1600, 25, 25, 50304, 1024), 64, 512)
    tokens = rate * 64 * 24 * 7 * 1024
    yield run, "1 week", f"{tokens / 1e9:.0f}e9 tokens", None, mfu, verdict
    run = "GPT-3 175B, 1024 GPUs, 300e9 tokens"
    verdict = "right with A100s (SC21: 34 days); with its own V100s 2.5 times as long"
    rate, mfu = fastest(Model(96, 12288, 96, 96, 50304, 2048), 1024, 1536)
    weeks = 300e9 / 2048 / rate / 1024 / 24 / 7
    yield run, "some weeks", f"{weeks:.1f} weeks", None, mfu, verdict


def later_runs() -> Iterator[tuple]:
    run = "Llama 2 70B, 2000 GPUs, 2e12 tokens"
    verdict = "right (1,720,320 in Touvron et al. 2023)"
    rate, mfu = fastest(Model(80, 8192, 64, 8, 32000, 4096, 10.5), 2048, 1024)
    hours = 2e12 / 4096 / rate
    yield run, "1.7M GPU-hours", f"{hours / 1e6:.2f}M", 1.7e6 / hours, mfu, verdict
    run = "10B, 8 A100s, 20 tokens a parameter"
    rate, mfu = fastest(guess(10e9, 50304, 2048), 8, 512)
    days = 200e9 / 2048 / rate / 8 / 24
    verdict = f"wrong or hardly trained: two weeks see {14 / days * 20:.1f} tokens a parameter"
    yield run, "14 days", f"{days:.0f} days", 14 / days, mfu, verdict
    run = "Llama 3 405B, 16K and 8K H100s, MFU"
    verdict = "high: 38 to 43 % in the report"
    m = Model(126, 16384, 128, 8, 128256, 8192, 9.75)
    x = Layout(8, True, 1, 16, 1, "interleaved", 8, "fsdp", False)
    clusters = [Cluster(gpus, *GPUS["H100"]) for gpus in (16384, 8192)]
    large, small = [predict(m, c, x, 2048, "mixed").mfu for c in clusters]
    yield run, "38 to 45 %", f"{large:.0%} to {small:.0%}", None, small, verdict


def runs() -> str:
    """The course texts' runs: what they claim, what our fastest layout needs, what is wrong."""
    lines = [f"{'run':41}{'the text':>16}{'ours':>16}{'text/ours':>11}   MFU  verdict"]
    for run, text, ours, ratio, mfu, verdict in (*bert_runs(), *gpt_runs(), *later_runs()):
        ratio = f"{ratio:.2f}" if ratio else "-"
        lines.append(f"{run:41}{text:>16}{ours:>16}{ratio:>11} {mfu:5.0%}  {verdict}")
    lines += ["", "A100s of 80 GB, or as said; sequences and tokens are the papers'."]
    return "\n".join(lines)


if __name__ == "__main__":
    if {"--help", "-h"} & {*sys.argv}:
        print(__doc__ + "\n" + usage(FLAGS, WORDS))
        sys.exit()
    try:
        print(runs() if sys.argv[1:] == ["runs"] else table(parse(sys.argv[1:])))
    except ValueError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        sys.exit(2)
