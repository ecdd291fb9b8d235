"""Expert parallelism alone, on weights of one's own, and the commands that resume with it."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

import train
from layers.moe import MoE
from parallel.ddp import DDP
from parallel.expert import names_of, split
from parallel.fsdp import FSDP
from parallel.zero import ZeRO
from settings import parse

CPU = torch.device("cpu")
LAYOUTS = {
    "ddp": lambda others: DDP(dist.group.WORLD, CPU, others=others),
    "zero1": lambda others: ZeRO(dist.group.WORLD, CPU, 1, blocks="", others=others),
    "fsdp": lambda others: FSDP(dist.group.WORLD, CPU, blocks="", others=others),
}


class Expert(torch.nn.Module):
    gate, activation = None, staticmethod(torch.relu)

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 16, bias=False)
        self.proj = torch.nn.Linear(16, 8, bias=False)


def given_weights(rank, world, layout):
    torch.manual_seed(rank)  # rank 0's router and shared weights count, and each expert's own
    model = torch.nn.Sequential(MoE(8, [Expert() for _ in range(4)], n_active=2))
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    split(model, dist.group.WORLD, [0])
    model = LAYOUTS[layout](dict.fromkeys(names_of(model))).parallelize(model)
    held = {}
    for name, p in model.named_parameters():
        held[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    return full, held


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_weights_of_experts_stay_with_their_ranks(layout):
    (first, held_first), (second, held_second) = run_ranks(2, given_weights, layout)
    for mine, held, experts in ((first, held_first, "01"), (second, held_second, "23")):
        of_experts = [name for name in held if ".experts." in name]
        assert {name.split(".experts.")[1][0] for name in of_experts} == set(experts)
        for name in of_experts:
            assert torch.equal(held[name], mine[name])
        assert torch.equal(held["0.router.weight"], first["0.router.weight"])


# ---- commands ------------------------------------------------------------------------------------
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4", "--steps=2"]
TINY += ["--eval_every=0", "--sample_tokens=0", "--plot=false", "--threads=1", "--optim=sgd"]


def go(rank, world, *words):
    return train.main(parse.parse([*words]))["step"]


def test_a_branch_goes_on_with_ep_and_its_terms_without_its_experts_typed_again(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * i) for i in range(2000)))
    words = [*TINY, f"--data={text}", f"--out_dir={tmp_path}/run"]
    go(0, 1, *words, "--n_expert=4")
    branch = [f"--resume={tmp_path}/run", f"--out_dir={tmp_path}/b", "--steps=4"]
    assert run_ranks(2, go, *branch, "--ep=2", "--moe_bias_lr=0.1") == [4, 4]
    assert "n_expert = 4" in (tmp_path / "b/config.toml").read_text()
    # Where nothing brings experts, these words mean nothing.
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match="moe_bias_lr means nothing without experts"):
            go(0, 1, *TINY, f"--data={text}", f"--resume={resume}", "--moe_bias_lr=0.1")
    dense = [*TINY, f"--data={text}", f"--out_dir={tmp_path}/dense"]
    go(0, 1, *dense)
    with pytest.raises(ValueError, match="means nothing without experts"):
        go(
            0,
            1,
            *dense,
            f"--resume={tmp_path}/dense",
            f"--out_dir={tmp_path}/c",
            "--moe_bias_lr=0.1",
        )
