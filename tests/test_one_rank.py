"""Every data-parallel layout in a group of one rank, without a fork: NCCL on a GPU, else gloo."""

from datetime import timedelta

import pytest
import torch
import torch._dynamo  # before a test of another file forks, as test_fsdp does
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor

from model import GPT, GPTConfig, initial_weight
from optim.adamw import AdamW
from optim.muon import Muon
from optim.param_groups import param_groups
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.launch import backend_of
from parallel.mesh import make_mesh
from parallel.zero import ZeRO

SHAPE = dict(
    n_layer=2, n_head=2, n_kv_head=2, n_embd=16, block_size=8, vocab_size=32, zero_init=False
)
LAYOUTS = {
    "ddp": DDP,
    "zero1": lambda group, device: ZeRO(group, device, 1),
    "zero2": lambda group, device: ZeRO(group, device, 2),
    "zero3": lambda group, device: ZeRO(group, device, 3),
    "fsdp": FSDP,
}


@pytest.fixture
def group(device, tmp_path):
    """A process group of this process alone, with a store of its own."""
    dist.init_process_group(
        backend_of(device),
        store=dist.FileStore(str(tmp_path / "store"), 1),
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=20),
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def trained(group, device, layout, cls) -> dict[str, torch.Tensor]:
    """The weights after three steps of two micro-batches."""
    draws = [torch.Generator().manual_seed(step) for step in range(3)]
    batches = [torch.randint(32, (4, 9), generator=draw).to(device) for draw in draws]
    config = GPTConfig(**SHAPE)
    replicas = LAYOUTS[layout](group, device)
    with torch.device("meta"):
        model = GPT(config).double()
    model = replicas.parallelize(model)
    replicas.init_weights(lambda name, shape: initial_weight(config, name, shape))
    lrs = dict.fromkeys(("embedding", "head", "matrix", "scalar"), 0.02)
    options = {"ns_dtype": "float64"} if cls is Muon else {}
    groups = param_groups(model, lrs, 0.1, muon=cls is Muon)
    optimizer = replicas.make_optimizer(cls, groups, **options)
    for tokens in batches:
        for i, part in enumerate(tokens.chunk(2)):
            replicas.last_micro_batch(i == 1)
            (model(part[:, :-1], part[:, 1:]) / 32).backward()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
    weights = replicas.weights().items()
    return {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in weights}


@pytest.mark.gpu
@pytest.mark.parametrize("layout, cls", [(layout, AdamW) for layout in LAYOUTS] + [("zero1", Muon)])
def test_a_layout_of_one_rank_steps_as_one_process(group, device, layout, cls):
    found, expected = (trained(of, device, layout, cls) for of in (group, None))
    assert found.keys() == expected.keys() and len(found) > 10
    for name, w in expected.items():
        assert w.device == found[name].device == device, name
        torch.testing.assert_close(found[name], w, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_sums_and_norms_of_one_rank_are_its_own(group, device):
    mesh, x = make_mesh(device), torch.arange(4.0, device=device)
    dist.all_reduce(x)
    assert x.tolist() == [0, 1, 2, 3] and dist.get_backend() == backend_of(device)
    assert mesh.sum(1.5, True) == [1.5, 1.0] and mesh.alike("a text")
    assert mesh.norm([x, x]).item() == pytest.approx(28**0.5)
