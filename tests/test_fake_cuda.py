"""What a step computes on a GPU, on tensors that only claim to be there: no GPU is needed.

A fake tensor has a shape, a dtype and a device, and no numbers. An operator that meets one on
"cuda" and one on "cpu" raises, as CUDA's would, and so does every read of a number by Python, for
which a real GPU would have to be waited for. So these tests say: no tensor was left on the host,
and a step asks the GPU for no number.

They cannot say what needs numbers or a driver: backward and autocast, streams and pinned memory,
eigh's check of its result (replaced below), torch.bincount, and generation, which draws tokens on
the CPU.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_optim_contract import CASES
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from layers import attention, document_mask
from layers.generation import KVCache
from model import GPT, GPTConfig
from optim import adamw, muon, param_groups, qk_clip, shampoo, soap
from optim.attributes import attribute
from parallel import compression, context
from parallel.ddp import DDP
from parallel.diloco import DiLoCo
from parallel.mesh import Mesh
from parallel.replicas import allocate
from precision import fp8
from precision.loss_scale import LossScaler
from precision.stochastic import stochastic

GPU = torch.device("cuda", 0)
aten = torch.ops.aten


class NoDriver(TorchFunctionMode):
    """These methods, called from Python, ask for a CUDA driver; their operators do not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.copy_:
            return aten.copy_(*args[:2])
        if function is Tensor.__invert__:
            return aten.bitwise_not(*args)
        if function is Tensor.contiguous:
            return aten.contiguous(*args)
        if function is Tensor.__getitem__:
            return view(*args)
        if function is Tensor.__setitem__:
            x, index, value = args
            return aten.copy_(view(x, index), torch.as_tensor(value))
        return function(*args, **(kwargs or {}))


def view(x: Tensor, index) -> Tensor:
    """x[index]"""
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in index if not torch.is_tensor(i)]:
        at = index.index(Ellipsis)
        missing = x.ndim - sum(i is not None for i in index) + 1
        index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
    if any(torch.is_tensor(i) for i in index):
        return aten.index(x, [i if torch.is_tensor(i) else None for i in index])
    dim = 0
    for i in index:
        if i is None:
            x = x.unsqueeze(dim)
        elif isinstance(i, int):
            x = x.select(dim, i)
            continue
        else:
            x = aten.slice(x, dim, i.start, i.stop, i.step or 1)
        dim += 1
    return x


@pytest.fixture
def gpu():
    """Within a test, tensors are fake."""
    with FakeTensorMode(), NoDriver():
        yield GPU


def shapes(dtype=torch.float32, **traits) -> GPT:
    """A model without memory."""
    shape = dict(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=32)
    with unset_fake_temporarily(), torch.device("meta"):
        return GPT(GPTConfig(**shape | traits)).to(dtype)


def small(dtype=torch.float32, **traits) -> GPT:
    """A model on the fake GPU, as a layout allocates it."""
    return allocate(shapes(dtype, **traits), GPU)


def empty(*shape, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def ids(*shape) -> Tensor:
    return empty(*shape, dtype=torch.long)


def groups_of(model, matrices_only=False) -> list[dict]:
    lrs = dict.fromkeys(("embedding", "head", "matrix", "scalar"), 0.1)
    return param_groups.param_groups(model, lrs, 0.1, matrices_only)


def give_gradients(model) -> None:
    for p in model.parameters():
        p.grad = torch.empty_like(p)


def test_a_tensor_left_on_the_host_raises(gpu):
    with pytest.raises(RuntimeError, match="two devices"):
        empty(2) + torch.empty(2)
    with pytest.raises(DataDependentOutputException):
        empty(1).item()


# ---- optimizers ----------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_a_step_of_each_optimizer_stays_on_the_gpu(gpu, cls, monkeypatch):
    for module in shampoo, soap:
        monkeypatch.setattr(module, "eigh", lambda L: (L.sum(0), L))  # it reads whether it failed
    model = shapes(norm="layernorm", bias=True)
    # Every other parameter in half precision, whose steps go through float32 copies.
    for p in [*model.parameters()][::2]:
        with unset_fake_temporarily():
            p.data = p.data.bfloat16()
    allocate(model, GPU)
    options = {**CASES[cls][0]}
    if "precondition_frequency" in options:
        options["precondition_frequency"] = 1
    optimizer = cls(groups_of(model, attribute(cls, "matrices_only")), **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(2):
        give_gradients(model)
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    states = [x for state in optimizer.state.values() for x in state.values()]
    assert {x.device for x in states if torch.is_tensor(x)} == {GPU}


@pytest.mark.parametrize("cls", [adamw.AdamW, muon.Muon])
def test_the_fused_kernel_gets_float32_steps_on_the_gpu(gpu, cls, monkeypatch):
    seen = []

    def kernel(*args, **options):
        seen.extend(args[5])

    monkeypatch.setattr(torch, "_fused_adamw_", kernel)
    # A user may set it. The kernel reads float32 all the same.
    torch.set_default_dtype(torch.float64)
    try:
        model = small()
        optimizer = cls(groups_of(model, attribute(cls, "matrices_only")), fused=True)
        give_gradients(model)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen
    assert {(x.device, x.dtype) for x in seen} == {(GPU, torch.float32)}


def test_stochastic_rounding_stays_on_the_gpu(gpu):
    model = small(torch.bfloat16)
    optimizer = stochastic(adamw.AdamW(groups_of(model)), seed=1)
    give_gradients(model)
    optimizer.step()


def test_qk_clip_scales_the_weights_on_the_gpu(gpu):
    groups = groups_of(small(qk_norm=False))
    qk_clip.clip(groups, empty(1, 4), 100.0, n_kv_head=2, head_size=8, shards={})


# ---- the model -----------------------------------------------------------------------------------
TRAITS = {
    "modern": {},
    "gpt2": dict(norm="layernorm", position="learned", activation="gelu", tied=True, bias=True),
    "track3": dict(norm="rmsnorm_gain", position="rotary_half", embed_norm=True, head_bias=True),
    "window": dict(window=4),
    "plain": dict(attention="plain", window=4),
    "dropout": dict(dropout=0.1),
    "ngram_embed": dict(ngram_embed=3, ngram_rows=64),
}


@pytest.mark.parametrize("name", TRAITS)
def test_a_forward_stays_on_the_gpu(gpu, name):
    model = small(torch.float64 if name == "window" else torch.float32, **TRAITS[name])
    with torch.no_grad():
        loss = model(ids(2, 16), ids(2, 16), torch.arange(16, device=GPU), ids(2))
    assert loss.device == GPU


def test_attention_with_a_cache_stays_on_the_gpu(gpu):
    model = small(window=4).eval()
    for block in model.blocks.values():
        block.attn.attention_fn = KVCache(4)
    with torch.no_grad():
        model(ids(1, 6))
        logits = model(ids(1, 1), position_ids=torch.arange(6, 7, device=GPU))
    assert logits.device == GPU


@pytest.mark.parametrize("kind", ["sdpa", "plain"])
def test_each_attention_stays_on_the_gpu(gpu, kind):
    for window in (None, 4):
        out = attention.choose(kind, window)(empty(1, 4, 16, 8), *[empty(1, 2, 16, 8)] * 2)
        assert out.device == GPU


def test_a_mask_goes_to_the_gpu_with_as_many_heads_of_keys_as_of_queries(gpu, monkeypatch):
    """torch has no kernel for a mask and grouped heads, and would write the scores out."""
    plain = F.scaled_dot_product_attention
    masked = []

    def kernel(q, k, v, attn_mask=None, **options):
        if attn_mask is not None:
            masked.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return plain(q, k, v, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    inputs = [empty(1, 4, 16, 8), *[empty(1, 2, 16, 8)] * 2]
    attention.causal_attention(*inputs, window=4)
    starts = document_mask.starts(torch.zeros(1, 16, dtype=torch.long, device=GPU), 0)
    attention.causal_attention(*inputs, documents=document_mask.make("sdpa", None, starts))
    assert masked == [(4, 4, 4, False)] * 2


def test_ring_attention_calls_the_gpus_kernels_as_they_are_declared(gpu, monkeypatch):
    monkeypatch.setattr(context, "on_gpu", lambda q: True)
    q, dout = (empty(1, 4, 8, 16, dtype=torch.bfloat16) for _ in range(2))
    k, v = (empty(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(2))
    out, lse = context.block(q, k, v, True)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (1, 4, 8), torch.float32)
    gradients = context.block_backward(dout, q, out, lse, k, v, True)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


# ---- fp8 -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [
    dict(scaling="block", power_of_two=True),
    dict(scaling="row"),
    dict(scaling="tensor", delayed=True, gradient_format="e5m2"),
])  # fmt: skip
def test_emulated_fp8_stays_on_the_gpu(gpu, options):
    model = small()
    state = fp8.convert(model, GPU, hardware="never", **options)
    with torch.no_grad():
        model(ids(2, 16), ids(2, 16))
    state.step()


@pytest.mark.parametrize(
    "roles", [(fp8.X, fp8.WEIGHT), (fp8.GRADIENT, fp8.WEIGHT), (fp8.GRADIENT, fp8.X)]
)
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
def test_the_hardwares_product_gets_what_torch_declares(gpu, scaling, roles):
    """torch checks shapes, strides and dtypes of fake operands as it does on Hopper."""
    recipe = fp8.Recipe(scaling, (True,) * 3, "e4m3", False, hardware=True)
    for m, n, k in (384, 256, 128), (1, 768, 640), (3, 128, 1280):
        operands = []
        for role, rows in zip(roles, (m, n)):
            multiple = 128 if scaling == "block" else 16
            x = empty(rows + (-rows % 8 if role != fp8.WEIGHT else 0), k + -k % multiple)
            operands.append(fp8.quantise_operand(x, role, recipe, None))
        (qa, scale_a, _), (qb, scale_b, _) = operands
        out = fp8.scaled_mm(
            qa, qb, scale_a, scale_b, scaling, roles[1] == fp8.WEIGHT, torch.float32
        )
        assert (out.shape, out.dtype) == ((qa.shape[0], n), torch.float32)


def test_a_layer_multiplies_in_hardware_as_one_operator(gpu):
    recipe = fp8.Recipe("block", (True,) * 3, "e4m3", False, hardware=True)
    with torch.no_grad():
        y = fp8.linear(empty(2, 5, 200), empty(144, 200), recipe=recipe)
    assert (y.shape, y.device) == ((2, 5, 144), GPU)


# ---- norms, scaling, what is sent ----------------------------------------------------------------
def mesh_of(world: int) -> Mesh:
    sizes = {"pp": 1, "dp": world, "cp": 1, "tp": 1}
    return Mesh(sizes, dict.fromkeys(sizes, 0), {}, 0, world, GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_clipping_and_unscaling_stay_on_the_gpu(gpu, dtype):
    mesh = mesh_of(1)
    gradients = {"a": empty(4, 4, dtype=dtype), "b": empty(4, dtype=dtype)}
    LossScaler().unscale(gradients)
    norm = mesh.norm([*gradients.values()])
    assert norm.device == GPU
    torch._foreach_mul_([*gradients.values()], (1.0 / (norm + 1e-6)).clamp(max=1.0))


@pytest.fixture
def two_ranks(gpu):
    """A group of two ranks that sends nothing: this process is rank 0."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("how", [None, "topk", "sign", "onebit", "powersgd", "fp16", "bf16"])
def test_replicas_send_tensors_on_the_gpu(two_ranks, how):
    reduce = None if how is None else getattr(compression, how)()
    layout = DDP(two_ranks, GPU, reduce=reduce)
    model = layout.parallelize(shapes())
    give_gradients(model)
    layout.finish_gradients()
    assert {x.device for x in layout.gradients().values()} == {GPU}


def test_diloco_stays_on_the_gpu(two_ranks):
    layout = DiLoCo(two_ranks, GPU, every=1)
    model = layout.parallelize(shapes())
    layout.init_weights(lambda name, shape: torch.empty(shape))
    optimizer = layout.make_optimizer(adamw.AdamW, groups_of(model))
    give_gradients(model)
    layout.finish_gradients()
    optimizer.step()
    with layout.outer_weights():
        pass


def test_a_norm_over_ranks_is_summed_on_the_gpu(two_ranks):
    mesh = mesh_of(2)
    # Also of gradients that offloading has brought to the host.
    for device in GPU, torch.device("cpu"):
        assert mesh.norm([torch.empty(3, device=device)]).device == device
    assert mesh.norm([]).device == GPU
