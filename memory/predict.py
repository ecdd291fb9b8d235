"""Bytes, traffic and time of a step on paper: a model, a cluster that we cannot try, a layout.

memory/ranks.py predicts the memory of the fullest stage, with AdamW. tp divides weights,
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

Neighbours: memory/activations.py, memory/flags.py, memory/ranks.py, memory/shapes.py,
optim/adamw.py, optim/attributes.py, optim/muon.py, parallel/replicas.py, precision/amp.py

Example:
    from memory.predict import Cluster, Layout, Model, predict
    model = Model(n_layer=32, n_embd=4096, n_head=32, n_kv_head=32)  # 6.9e9 parameters
    cluster = Cluster(64)  # A100s
    plan = predict(model, cluster, Layout(data_parallel="fsdp"), batch=512)
    print(f"{plan.step:.1f} s a step, MFU {plan.mfu:.0%}, {plan.held['total'] / 1e9:.0f} GB")
    assert plan.held["total"] < cluster.memory
"""

import functools
import inspect
import math
from dataclasses import dataclass, replace

from memory.activations import activation_bytes
from memory.ranks import bytes_per_rank, loss_bytes
from memory.shapes import GATED, Experts, Shapes, bytes_of, gpt_shapes, is_tied, mlp_size

# Fitted once to published runs, see above.
LIMIT = 1.34
PASSES = 11
REACHED = 0.65
HIDDEN = 0.6
# --loss_chunk=auto on a GPU, for a vocabulary of 8192 words or more.
LOSS_CHUNK = 4096


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
    tied: bool | None = None
    qkv_bias: bool | None = None

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
        n_vocabulary = 1 if is_tied(self.arch, self.tied) else 2
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
    """Bandwidths in bytes/s, one way. The defaults are an A100's (metrics/devices.py)."""

    gpus: int
    peak_flops: float = 312e12
    memory: float = 80e9
    memory_bandwidth: float = 2.039e12
    node_bandwidth: float = 300e9
    bandwidth: float = 25e9
    gpus_per_node: int = 8


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
    head = forward(0, 0, m.vocab_size, loss_chunk=loss_chunk(m)) / x.tp
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


def full_shapes(m: Model, experts: Experts | None) -> Shapes:
    """All parameters of the model, with these experts in place of its own."""
    return gpt_shapes(
        m.n_layer,
        m.n_embd,
        m.vocab_size,
        m.block_size,
        m.arch,
        m.n_head,
        m.n_kv_head,
        m.head_dim,
        m.mlp_width,
        m.qkv_bias,
        experts,
        m.tied,
    )


@functools.lru_cache(4096)
def stage_shapes(m: Model, tp: int, pp: int, ep: int = 1) -> Shapes:
    """The parameters of the largest stage on one tensor parallel rank.

    The first and the last stage hold equally much: one has the embedding, the other has the head.
    Several experts on a rank are one parameter here, of no more rows than there are words.
    """
    full = full_shapes(m, None if m.experts is None else replace(m.experts, n_expert=1))
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
    tokens = x.micro_batch_size * m.block_size / x.cp
    of_loss = loss_bytes(precision, tokens, m.vocab_size / x.tp, m.n_embd, loss_chunk(m))
    # The loss comes before the gradients of one micro-batch are there.
    at_loss = sum(of_loss) - (held["gradients"] if micro == 1 else 0)
    # What travels is beside it. One replica's buffers are those of the step, when it is gone.
    beside = held["buffers"] if n > 1 else 0
    more = max(0, beside + at_loss - held["buffers"])
    held["buffers"] += more
    held["total"] += held["activations"] + more
    return held


def loss_chunk(m: Model) -> int | None:
    """Tokens whose logits are there at once, on a GPU; None: all."""
    return LOSS_CHUNK if m.vocab_size >= 8192 else None


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


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
