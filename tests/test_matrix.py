"""The promise, cell by cell: any optimizer on any layout is the same run, and goes on on any
other."""

import copy
import functools
import shutil

import pytest
import torch
import torch.distributed as dist
from harness import fitted, run_ranks
from matrix import (
    LARGER,
    LAYOUTS,
    MODEL_PARALLEL,
    OPTIMIZERS,
    TINY,
    TOLERANCES,
    assert_one_process,
    column,
    difference,
    text,
    trace,
)

import train
from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from optim.attributes import attribute
from optim.kl_soap import KLSOAP
from optim.soap import SOAP
from optim.soap_muon import SOAPMuon
from parallel import expert
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.zero import ZeRO
from settings import parse

CPU = torch.device("cpu")


@functools.cache
def once(optimizers, *more, model="larger "):
    return column(f"one {model}process", "fp64", list(optimizers), *more)


# Not scale-free; elementwise; whole matrices; whole norms; whole rows; two sets of weights
FAST = ("SGD", "AdamW", "Muon", "LAMB", "Adafactor", "AdamW Schedule-Free")


@pytest.mark.parametrize(
    "layout, names",
    [
        ("zero3 2", FAST),
        *(pytest.param(name, tuple(OPTIMIZERS), marks=pytest.mark.slow) for name in LAYOUTS),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{len(x)} optimizers",
)
def test_every_optimizer_on_every_layout_is_one_process(layout, names):
    alone = once(names, model="")
    for name, found in column(layout, "fp64", list(names)).items():
        assert difference(found, alone[name]) < TOLERANCES.get(name, 1e-10), name
        assert abs(found[-1] / found[0] - 1) > 1e-4, (
            f"{name} learns nothing, so this proves nothing"
        )


SOME = ["SGD", "Muon", "LAMB"]  # not scale-free; whole matrices; whole norms
CUT_UP = "tp 2 + sp", "zero1 2 x pp 2"


def apart(layout, optimizers, *more):
    """{optimizer: how far this layout is from one process}"""
    alone, found = once(tuple(optimizers), *more), column(layout, "fp64", optimizers, *more)
    assert all(abs(losses[-1] / losses[0] - 1) > 1e-4 for losses in alone.values()), (
        "learns nothing"
    )
    return {name: difference(found[name], alone[name]) for name in optimizers}


@pytest.mark.parametrize(
    "layout",
    [
        CUT_UP[0],
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (CUT_UP[1], "cp 2", "fsdp 2 x tp 2", "pp 2 x tp 2")
        ),
    ],
)
def test_a_model_cut_up_is_one_process(layout):
    assert max(apart(layout, SOME).values()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("layout", MODEL_PARALLEL)
def test_every_optimizer_on_a_model_cut_up_is_one_process(layout):
    for name, found in apart(layout, list(OPTIMIZERS)).items():
        assert found < TOLERANCES.get(name, 1e-10), name


TIED = [
    "zero1 2 x pp 2",
    "pp 2 x tp 2",
    "zero1 2 x pp 2 interleaved",
    "zero1 2 x pp 2 zerobubble",
    "fsdp 2 x pp 2",
    "pp 2 x fsdp 2 x tp 2 + sp",
    "pp 2 x cp 2 x tp 2",
]
GPT2 = [
    "--arch=gpt2",
    "--n_kv_head=2",
    "--clip_value=0.02",
    "--eval_tokens=144",
    "--micro_batch_size=2",
]


@pytest.mark.parametrize(
    "layout", [TIED[1], *(pytest.param(x, marks=pytest.mark.slow) for x in TIED if x != TIED[1])]
)
def test_a_tied_head_biases_and_grouped_queries_are_cut_up_right(layout):
    assert max(apart(layout, ["SGD"], *GPT2).values()) < 1e-10


FAMILIES = {
    "llama": ["--qkv_bias=true", "--rope_scaling=llama3:4:1:4:16", "--mlp_width=24"],
    "qwen3": ["--head_dim=6", "--mlp_width=24"],
}


@pytest.mark.parametrize(
    "arch, layout",
    [
        ("qwen3", "tp 2 + sp"),
        ("qwen3", "zero3 2"),
        *(
            pytest.param(arch, layout, marks=pytest.mark.slow)
            for arch in FAMILIES
            for layout in LAYOUTS | MODEL_PARALLEL
            if (arch, layout) not in (("qwen3", "tp 2 + sp"), ("qwen3", "zero3 2"))
        ),
    ],
)
def test_llama_s_and_qwen_s_traits_are_one_process(arch, layout):
    assert_one_process(layout, f"--arch={arch}", *FAMILIES[arch])


def test_a_tied_gradient_meets_its_other_half_where_stages_would_choose_other_owners():
    """With 128 words the two stages deal out their parameters differently."""
    assert max(apart("zero1 2 x pp 2", ["SGD"], *GPT2, "--vocab_size=128").values()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--document_mask=true", "--document_token=32"]])
@pytest.mark.parametrize("layout", ["pp 2 interleaved", "pp 2 x fsdp 2 x tp 2 + sp"])
def test_the_sample_at_the_end_is_one_process_s(tmp_path, layout, more):
    text(tmp_path)
    found = []
    for name in ("one process", layout):
        on(name, [tmp_path / f"{name}-muon"], 4, [*LARGER, "--sample_tokens=20", *more])
        log = (tmp_path / f"{name}-muon" / "train.log").read_text()
        found.append(log[log.index("---- a sample") : log.index("\ndone ")])
    assert found[0] == found[1] and len(found[0]) > 50


MORE = "ddp 4", "zero1 2", "fsdp 2", "zero2 4", "zero3 4", "hybrid 2x2"


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) for name in ("zero3 2", *MORE)]
)
def test_float32_follows_one_process(layout):
    some = ["SGD", "AdamW", "Muon", "LAMB"]
    one, found = column("one process", "fp32", some), column(layout, "fp32", some)
    for name in some:
        assert difference(found[name], one[name]) < 1e-5, name


# ---- SOAP and its kin as they are: rounding grows without bound; each step from the oracle's -----
def layouts(group, world, expert_names):
    yield "ddp", DDP(group, CPU)
    for stage in (1, 2, 3):
        yield f"zero{stage}", ZeRO(group, CPU, stage)
    yield "fsdp", FSDP(group, CPU)
    yield "hybrid", FSDP(group, CPU, shard=world // 2)
    if expert_names:
        others = dict.fromkeys(expert_names)  # each expert is on one rank alone
        yield "ep, ddp", DDP(group, CPU, others=others)
        yield "ep, zero1", ZeRO(group, CPU, 1, others=others)
        yield "ep, fsdp", FSDP(group, CPU, others=others)


def tiny(device: str, traits: dict) -> GPT:
    shape = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, block_size=8, zero_init=False)
    with torch.device(device):
        model = GPT(GPTConfig(**shape, **traits))
    for module in model.modules():
        for name, x in module.named_buffers(recurse=False):
            if hasattr(module, "run_experts"):  # counts and biases: layouts allocate no buffers
                setattr(module, name, torch.zeros_like(x, device="cpu"))
    return model.double()


def lock_step(rank, world, cls, traits):
    oracle, lrs = (
        tiny("cpu", traits),
        dict.fromkeys(("matrix", "embedding", "head", "scalar"), 3e-3),
    )
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            p.copy_(initial_weight(oracle.config, name, tuple(p.shape)))
    weights = dict(oracle.named_parameters())
    experts = expert.names_of(oracle)
    muon = attribute(cls, "matrices_only")
    plain = cls(param_groups.param_groups(oracle, lrs, 0.1, muon), precondition_frequency=2)
    for step in range(5):
        tokens = torch.randint(256, (8, 9), generator=torch.Generator().manual_seed(step))
        saved = param_groups.state_by_name(plain)
        oracle.zero_grad()
        (oracle(tokens[:, :-1], tokens[:, 1:]) / 64).backward()
        for layout, replicas in layouts(dist.group.WORLD, world, experts):
            model, mine = tiny("meta", traits), tokens.chunk(world)[rank]
            if layout.startswith("ep"):
                expert.split(model, dist.group.WORLD, [0])
            model = fitted(replicas, cls, model).parallelize(model)
            replicas.init_weights(lambda name, shape: weights[name].detach())
            groups = param_groups.param_groups(model, lrs, 0.1, muon)
            optimizer = replicas.make_optimizer(cls, groups, precondition_frequency=2)
            # AdamW's groups, which Muon's kin have, step shards: they start anew, uncompared.
            whole = [g for g in plain.param_groups if g.get("use_muon", True)]
            names = [name for group in whole for name in group["names"]]
            state = copy.deepcopy({n: saved["state"].get(n, {}) for n in names})
            param_groups.load_state_by_name(
                optimizer, saved["groups"], lambda n, _: state.get(n, {})
            )
            replicas.last_micro_batch(True)
            (model(mine[:, :-1], mine[:, 1:]) / 64).backward()
            replicas.finish_gradients()
            expected = {}

            # The plain optimizer on the gathered gradient
            def update_of_one(optimizer, args, kwargs):
                for group in (g for g in optimizer.param_groups if g.get("use_muon", True)):
                    for name, p in zip(group["names"], group["params"]):
                        torch.testing.assert_close(
                            p.grad, weights[name].grad, rtol=1e-10, atol=1e-14
                        )
                        q = weights[name].detach().clone().requires_grad_()
                        options = {
                            k: v for k, v in group.items() if k in {*plain.defaults, "betas"}
                        }
                        alone = cls([{"params": [q], **options}])
                        if name in saved["state"]:
                            alone.state[q] = copy.deepcopy(saved["state"][name])
                        q.grad = p.grad.clone()
                        alone.step()
                        expected[name] = q.detach()

            optimizer.register_step_pre_hook(update_of_one)
            optimizer.step()
            groups = [g for g in optimizer.param_groups if g.get("use_muon", True)]
            named = ((n, p) for g in groups for n, p in zip(g["names"], g["params"]))
            for name, p in named:
                assert torch.equal(p, expected[name]), (layout, step, name)
            owned = torch.tensor([len(expected)])
            dist.all_reduce(owned)
            copies = {"ddp": world, "ep, ddp": world, "hybrid": 2}.get(layout, 1)
            n_alone = len(experts) if layout.startswith("ep") else 0
            assert owned == copies * (len(names) - n_alone) + n_alone, (layout, owned)
        plain.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    "traits", [{}, {"n_expert": 4, "router_z_loss": 0.01}], ids=["", "experts"]
)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("cls", [SOAP, KLSOAP, SOAPMuon], ids=lambda cls: cls.__name__)
def test_soap_in_lock_step_is_the_plain_optimizer_bitwise(cls, world, traits):
    run_ranks(world, lock_step, cls, traits)


# ---- saved in any layout, resumed in any other ---------------------------------------------------
PLACES = ["one process", "ddp 2", "zero1 2", "zero2 4", "zero3 2", "fsdp 4", "hybrid 2x2"]
KEPT = ["muon", "schedule_free", "soap"]


def go(rank, world, folders, steps, flags, shape):
    for folder in folders:
        optim = folder.name.split("-")[-1]
        argv = [
            f"--data={folder.parent}/squares.txt",
            f"--out_dir={folder}",
            *TINY,
            *shape,
            f"--optim={optim}",
            f"--steps={steps}",
            "--schedule=constant",
            "--eval_every=0",
            "--precision=fp64",
        ]
        argv += ["--opt.eps=1e-2", "--lr=1e-3"] if optim == "soap" else []
        train.main(parse.parse([*argv, "--data_parallel=ddp", *flags]))


def on(layout, folders, steps, shape):
    world, flags = (LAYOUTS | MODEL_PARALLEL).get(layout, (1, []))
    if world == 1:
        return go(0, 1, folders, steps, flags, shape)
    run_ranks(world, go, folders, steps, flags, shape)


def saved_and_resumed(folder, places, pairs, optimizers, shape=()):
    """Ten steps in one process; five in one layout of each pair, the next five in the other."""
    text(folder)
    on("one process", [folder / optim for optim in optimizers], 10, shape)
    for layout in dict.fromkeys(a for a, _ in pairs):
        on(layout, [folder / f"{places.index(layout)}-{optim}" for optim in optimizers], 5, shape)
    for layout in dict.fromkeys(b for _, b in pairs):
        copies = []
        for before in (a for a, b in pairs if b == layout):
            for optim in optimizers:
                saved = folder / f"{places.index(before)}-{optim}"
                copies.append(folder / f"{places.index(before)}-{places.index(layout)}-{optim}")
                shutil.copytree(saved, copies[-1])
        on(layout, copies, 10, shape)
        for copy_ in copies:
            optim = copy_.name.split("-")[-1]
            apart = difference(trace(copy_), trace(folder / optim))
            assert apart < (1e-3 if optim == "soap" else 1e-10), (copy_.name, layout, apart)


@pytest.mark.slow
def test_saved_in_one_layout_and_resumed_in_the_next(tmp_path):
    saved_and_resumed(tmp_path, PLACES, list(zip(PLACES, PLACES[1:] + PLACES[:1])), KEPT[:1])


@pytest.mark.slow
def test_saved_in_any_layout_and_resumed_in_any_other(tmp_path):
    saved_and_resumed(tmp_path, PLACES, [(a, b) for a in PLACES for b in PLACES], KEPT)


CUT_PLACES = [
    "one process",
    "tp 2 + sp",
    "pp 2 interleaved",
    "fsdp 2 x tp 2",
    "zero1 2 x pp 2",
    "zero3 2",
    "pp 2 x cp 2 x tp 2",
    "pp 2 x fsdp 2 x tp 2",
]


def test_saved_cut_up_and_resumed_cut_up_otherwise(tmp_path):
    places = CUT_PLACES[2:4]
    saved_and_resumed(tmp_path, places, [tuple(places)], KEPT[:1], LARGER)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), ("--arch=gpt2", "--n_kv_head=2")])
def test_saved_cut_up_in_any_way_and_resumed_in_any_other(tmp_path, shape):
    pairs = [(a, b) for a in CUT_PLACES for b in CUT_PLACES]
    saved_and_resumed(tmp_path, CUT_PLACES, pairs, KEPT, [*LARGER, *shape])
