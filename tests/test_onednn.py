import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from precision import onednn

there = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available(),
    reason="this torch has no oneDNN",
)


@there
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(7,), (3, 5)])
def test_a_product_and_its_gradients_are_float64s_to_float32_precision(rows, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(*rows, 33), torch.randn(17, 33), torch.randn(17) if bias else None
    into = torch.randn(*rows, 17)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, b) if t is not None]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad((y * into.to(dtype)).sum(), leaves)]

    for mine, exact in zip(
        gradients(onednn.linear, torch.float32), gradients(F.linear, torch.float64)
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@there
def test_frozen_inputs_and_weights_get_no_gradient():
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    onednn.linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    onednn.linear(x.requires_grad_(), weight.detach()).sum().backward()
    assert x.grad is not None


def test_it_is_used_for_fp32_on_amd_cpus_alone(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(
        platform, "processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD"
    )
    assert onednn.faster(torch.float32, cpu)
    assert not onednn.faster(torch.bfloat16, cpu) and not onednn.faster(torch.float64, cpu)
    assert not onednn.faster(torch.float32, torch.device("cuda"))
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert not onednn.faster(torch.float32, cpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not onednn.faster(torch.float32, cpu)
