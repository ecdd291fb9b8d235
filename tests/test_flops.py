import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from memory.meter import Meter
from metrics.devices import DEVICES, TYPED, find, typed
from metrics.flops import active_params, flops_per_token, matmul_params, mfu, peak_bytes, peak_flops
from model import GPT, GPTConfig
from settings import fields


class TinyGPT(nn.Module):
    """Attention by plain matrix products: the full square is really computed, as the convention
    counts it."""

    def __init__(self, n_layer=2, n_head=2, n_embd=16, vocab_size=40, tied=True):
        super().__init__()
        self.n_head = n_head
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(n_embd, n_embd, bias=False) for name in "qkvo"}
                | {"up": nn.Linear(n_embd, 4 * n_embd), "down": nn.Linear(4 * n_embd, n_embd)}
            )
            for _ in range(n_layer)
        )
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, idx):
        x = self.wte(idx)  # (B, T, C)
        B, T, C = x.shape
        for layer in self.layers:
            # (B, H, T, D)
            q, k, v = (layer[n](x).view(B, T, self.n_head, -1).transpose(1, 2) for n in "qkv")
            mask = torch.ones(T, T).triu(1).bool()
            # (B, H, T, T)
            attention = (q @ k.transpose(-2, -1)).masked_fill(mask, float("-inf")).softmax(-1)
            x = x + layer["o"]((attention @ v).transpose(1, 2).reshape(B, T, C))
            x = x + layer["down"](F.gelu(layer["up"](x)))
        return self.head(x)


def test_gpt2_124m_costs_what_the_hand_calculation_says():
    # Q, k, v, o and the two of the MLP; the head once
    n = 12 * 12 * 768**2 + 50257 * 768
    assert n == 123_532_032
    assert flops_per_token(n, 12, 768, 1024) == 6 * 123_532_032 + 113_246_208 == 854_438_400


@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_equals_what_torch_counts_operation_by_operation(tied):
    model, B, T = TinyGPT(tied=tied), 3, 24
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(40, (B, T))).sum().backward()
    assert counter.get_total_flops() == B * T * flops_per_token(matmul_params(model), 2, 16, T)


@pytest.mark.parametrize("arch", fields.ARCHS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_head, head_dim", [(4, None), (2, 12), (1, None)])
def test_the_formula_equals_what_torch_counts_for_the_model(arch, tied, n_kv_head, head_dim):
    c = GPTConfig(
        n_layer=3,
        n_head=4,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_embd=32,
        block_size=24,
        vocab_size=72,
        **fields.ARCHS[arch] | {"tied": tied},
    )
    model, x = GPT(c), torch.randint(72, (5, 24))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    formula = flops_per_token(matmul_params(model), 3, 4 * (head_dim or 8), 24)
    assert counter.get_total_flops() == x.numel() * formula


@pytest.mark.parametrize("arch", ["modern", "llama"])
@pytest.mark.parametrize(
    "experts",
    [
        dict(n_expert=4),
        dict(n_expert=6, n_expert_active=3, moe_every=2),
        dict(n_expert=4, n_expert_active=1, n_shared_expert=2, expert_width=24),
        dict(n_expert=3, n_expert_active=3),
    ],
)
def test_of_experts_those_count_that_a_token_goes_through(arch, experts):
    c = GPTConfig(
        n_layer=4,
        n_head=4,
        n_kv_head=4,
        n_embd=32,
        block_size=24,
        vocab_size=72,
        **fields.ARCHS[arch],
        **experts,
    )
    model, x = GPT(c), torch.randint(72, (5, 24))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    formula = flops_per_token(matmul_params(model), 4, 32, 24)
    assert counter.get_total_flops() == x.numel() * formula
    # By hand: a token's experts, and all that is no expert.
    of_expert = (3 if arch == "llama" else 2) * 32 * c.expert_size
    idle = c.n_expert - c.n_expert_active
    n_layers = sum(c.has_experts(i) for i in range(4))
    n_params = sum(p.numel() for p in model.parameters())
    assert active_params(model) == n_params - n_layers * idle * of_expert


def test_torch_does_not_halve_causal_attention_either_and_a_fused_backward_has_one_product_more():
    B, H, T, D = 2, 3, 16, 8
    shapes = [(B, H, T, D)] * 3
    product = 2 * B * H * T * T * D
    assert sdpa_flop_count(*shapes) == 2 * product  # q k', then weights v
    # Four gradients, and q k' once more
    assert sdpa_backward_flop_count(shapes[0], *shapes) == 5 * product
    assert 6 * product == B * T * flops_per_token(0, 1, H * D, T)  # recomputation is not counted


def test_matmul_params_count_the_head_once_tied_or_not_and_no_embedding():
    expected = 2 * 12 * 16**2 + 40 * 16
    assert matmul_params(TinyGPT(tied=True)) == matmul_params(TinyGPT(tied=False)) == expected
    untied = sum(p.numel() for p in TinyGPT(tied=False).parameters())
    # Not counted: the embedding and the MLP's biases
    assert untied == expected + 40 * 16 + 2 * 5 * 16


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("Tesla V100-SXM2-16GB", None),  # no bf16 on Volta
        ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H800 PCIe", 756.5),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H20", 148),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_each_device_has_its_own_dense_peak(name, tflops):
    assert peak_flops(name, "bf16") == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_v100_and_t4_have_fp16_and_fp32_peaks():
    assert peak_flops("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-PCIE-16GB", "fp16") == 112e12
    assert peak_flops("Tesla V100S-PCIE-32GB", "fp16") == 130e12
    assert peak_flops("Tesla T4", "fp32") == pytest.approx(8.1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "AMD Instinct MI300A",
        "NVIDIA GB10",  # nobody publishes its bf16
        "NVIDIA H100",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA A1000",
        "NVIDIA T400",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A10-4Q",
        "NVIDIA A100-40C",
        "NVIDIA L40S-48A",
        "GRID A100-4C",
        "GRID A100",
    ],
)
def test_hardware_that_is_not_in_the_table_has_no_peak(name):
    assert peak_flops(name, "bf16") is None


def test_no_peak_is_made_up_for_a_precision_the_hardware_lacks():
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp8") is None
    assert peak_flops("NVIDIA H200", "fp64") is None


def test_the_table_is_ordered_as_hardware_is():
    for name, device in DEVICES.items():
        peaks = device.peaks
        if not peaks:
            continue
        order = [peaks[p] for p in ("fp32", "tf32", "bf16", "fp8") if p in peaks]
        assert order == sorted(order), name
        assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"], name


def test_bytes_and_links_are_as_published():
    """GB, GB/s of memory, GB/s one way to GPUs of the machine."""
    for name, figures in {
        "A10": (24, 600, 32),
        "L4": (24, 300, 32),
        "L40S": (48, 864, 32),
        "RTX 3090": (24, 936, 32),
        "RTX 4090": (24, 1008, 32),
        "RTX 5090": (32, 1792, 64),
        "H20": (96, 4000, 450),
        "MI300X": (192, 5300, 448),
        "B200": (180, 8000, 900),
        "GB200": (186, 8000, 900),
        "GB10": (128, 273, None),
    }.items():
        device = DEVICES[name]
        assert (device.memory, device.bandwidth, device.link) == figures, name
    # 304 units x 2.1 GHz x 2048 operations
    assert DEVICES["MI300X"].peaks["bf16"] == pytest.approx(304 * 2.1e9 * 2048 / 1e12, rel=1e-4)


def test_a_card_is_found_by_what_people_type():
    for text in "4090", "rtx4090", "RTX-4090", "NVIDIA RTX 4090":
        assert typed(text) == "RTX 4090"
    assert (
        DEVICES[typed("h100")] is find("NVIDIA H100 80GB HBM3") and typed("h100-nvl") == "H100 NVL"
    )
    assert all(DEVICES[name].bandwidth for name in TYPED.values()) and "t4" not in TYPED
    for text, says in ("A1000", "did you mean A100"), ("TPU v5", "there are: A10, "):
        with pytest.raises(ValueError, match=says):
            typed(text)


def test_mfu_is_the_fraction_of_peak_and_none_when_the_peak_is_unknown():
    assert mfu(178_000, 854_438_400, 312e12) == pytest.approx(0.48746, abs=1e-5)
    assert mfu(178_000, 854_438_400, None) is None


@pytest.mark.slow  # as much memory as this process has ever had
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak resident set")
def test_peak_bytes_sees_what_the_process_touches():
    before = peak_bytes(torch.device("cpu"))
    assert 20e6 < before < 1e12  # an interpreter with torch in it, in bytes
    held = torch.ones(before // 4 + 100_000_000 // 4)  # more than was ever held
    assert peak_bytes("cpu") - before > 50e6
    assert held.sum() > 0


def test_peak_bytes_is_none_where_the_system_does_not_tell(monkeypatch):
    # Importing it now fails, as on Windows
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes("cpu") is None


def test_peak_bytes_asks_the_allocator_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_bytes(torch.device("cuda", 0)) == 123


@pytest.mark.gpu
def test_the_meter_finds_what_the_allocator_of_a_gpu_has_given_at_most(device):
    x = torch.ones(1000, 1000, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - x.nbytes
    with Meter() as meter:
        y = x.exp()
        z = y * x
        del y
        z.sum()
    assert meter.peak == 3 * x.nbytes
    if device.type == "cuda":
        assert peak_bytes(device) - others == pytest.approx(meter.peak, rel=0.01)
