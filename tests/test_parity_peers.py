"""Other people's layouts beside one process: torch's own, DeepSpeed's ZeRO, transformers' plan.

They agree, and a fault in their use is named. Slow; what is not installed is skipped.
"""

import os

import pytest
import torch

from examples import parity_torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", parity_torch.LAYOUTS)
def test_torch_layouts_are_one_process(layout, tmp_path):
    said = parity_torch.compared([layout], str(tmp_path))
    assert said == {layout: "all 744 tensors agree"}


def test_ddp_that_never_reduces_is_named(tmp_path, monkeypatch):
    def unsynced(rank, world, folder):
        ddp = torch.nn.parallel.DistributedDataParallel
        with monkeypatch.context() as patch:
            patch.setattr(ddp, "forward", lambda self, *args: self.module(*args))
            parity_torch.ddp(rank, world, folder)

    monkeypatch.setitem(parity_torch.LAYOUTS, "ddp", unsynced)
    said = parity_torch.compared(["ddp"], str(tmp_path))["ddp"]
    assert "gradient of head.bias, in step 1" in said
    assert "likely: not summed" in said


def test_a_norm_that_the_plan_forgets_is_named(tmp_path, monkeypatch):
    """Without SequenceParallel() a norm sees its tokens alone, and nobody sums its gradient."""
    from torch.distributed.tensor import parallel

    real = parallel.parallelize_module

    def forgetful(model, mesh, plan):
        return real(model, mesh, {k: v for k, v in plan.items() if k != "layers.*.norm2"})

    monkeypatch.setattr(parallel, "parallelize_module", forgetful)
    said = parity_torch.compared(["tp"], str(tmp_path))["tp"]
    assert "gradient of layers.3.norm2.bias, in step 1" in said
    assert "likely: a replicated weight left partial: not summed over tp" in said


def test_a_head_that_the_plan_unties_is_named(tmp_path, monkeypatch):
    """findings/torch_parallelize_module_unties.sh"""
    real = parity_torch.make

    def tied():
        model = real()
        model.head = torch.nn.Linear(parity_torch.WIDTH, parity_torch.VOCAB, bias=False).double()
        model.head.weight = model.tokens.weight
        return model

    monkeypatch.setattr(parity_torch, "make", tied)
    said = parity_torch.compared(["ddp", "fsdp2", "tp"], str(tmp_path))
    assert said["ddp"] == said["fsdp2"] == "all 730 tensors agree"
    assert "gradient of tokens.weight, in step 1" in said["tp"]
    assert "likely: one half of a tied weight" in said["tp"]


def test_deepspeed_is_one_process(tmp_path):
    pytest.importorskip("deepspeed")
    from examples import parity_deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    said = parity_deepspeed.compared([1, 2, 3], str(tmp_path))
    assert said == dict.fromkeys((1, 2, 3), "all 744 tensors agree")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_transformers_plan_is_one_process(kind, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from examples import parity_transformers

    said = parity_transformers.compared(kind, str(tmp_path))
    assert said.startswith("all ") and said.endswith(" tensors agree")
