"""What a run decides for itself, and what it does where there is not enough of something."""

import errno
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_train import close, flags, go, on_ranks, rows, trace

import optim
import schedules
from checkpoint import load
from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from optim.attributes import ASSUMED, attribute, own_classes
from optim.sgd import SGD
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.mesh import make_mesh
from parallel.replicas import mapped_file
from parallel.zero import ZeRO
from precision import amp
from run import announce, auto, batch, build, optimizers, resume
from run.options import resolve_options
from settings import fields, parse

CPU = torch.device("cpu")
ONE = make_mesh(CPU, 1, 1, 1)


def trained(rank, world, layout, probe, fails=()):
    """Two losses, and the micro-batch size found on a machine that says it is a GPU."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, block_size=8)).double()
    kinds = {
        "ddp": DDP,
        "shard1": lambda *a: FSDP(*a, shard=1),
        "fsdp": FSDP,
        "zero1": lambda *a: ZeRO(*a, 1),
        "zero3": lambda *a: ZeRO(*a, 3),
    }
    replicas, size = kinds[layout](dist.group.WORLD, CPU), None
    model = replicas.parallelize(model)
    replicas.init_weights(lambda name, shape: initial_weight(model.config, name, shape))
    rows = torch.randint(256, (4 * world, 9), generator=torch.Generator().manual_seed(0))

    def run(numbers, dataset=None):
        if len(numbers) in fails:
            raise torch.OutOfMemoryError("simulated")
        mine = rows[rank * 4 + torch.tensor(list(numbers))]
        return model(mine[:, :-1], mine[:, 1:]) / 256, None

    if probe:
        mesh = make_mesh(CPU)
        gpu = types.SimpleNamespace(type="cuda")
        mesh = types.SimpleNamespace(device=gpu, sum=mesh.sum, sizes=mesh.sizes, groups=mesh.groups)
        engine = types.SimpleNamespace(model=model, replicas=replicas, forward=run)
        size = batch.largest_micro_batch(engine, None, 4, mesh)
    lrs = dict.fromkeys(("matrix", "embedding", "head", "scalar"), 1.0)
    optimizer, losses = replicas.make_optimizer(SGD, param_groups.param_groups(model, lrs, 0.0)), []
    for _ in range(3):
        replicas.last_micro_batch(True)
        loss = run(range(size or 4))[0]
        loss.backward()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, size, replicas.sent_bytes


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero3", "fsdp", "shard1"])
def test_looking_for_the_micro_batch_that_fits_leaves_no_trace(layout):
    assert run_ranks(2, trained, layout, True) == [
        (losses, 4, sent) for losses, _, sent in run_ranks(2, trained, layout, False)
    ]


def test_out_of_memory_halves_the_micro_batch_or_says_what_to_type():
    for layout in ("ddp", "zero1"):
        assert [size for _, size, _ in run_ranks(2, trained, layout, True, (4,))] == [2, 2]
    with pytest.raises(Exception, match="type --micro_batch_size=2, or less"):
        run_ranks(2, trained, "zero3", True, (4,))


def test_only_too_little_memory_halves_the_micro_batch():
    """cuBLAS allocates by itself, and says so in words of its own."""
    said = "CUDA error: {} when calling `cublasCreate(handle)`".format
    layout = types.SimpleNamespace(
        backward_is_collective=False, last_micro_batch=lambda is_last: None
    )
    gpu = types.SimpleNamespace(type="cuda")
    mesh = types.SimpleNamespace(device=gpu, sizes=ONE.sizes, sum=ONE.sum, groups=ONE.groups)

    def found(error: RuntimeError) -> int:
        def forward(ids, dataset):
            if len(ids) > 2:
                raise error
            return torch.ones((), requires_grad=True), None

        runs = types.SimpleNamespace(model=torch.nn.Module(), replicas=layout, forward=forward)
        return batch.largest_micro_batch(runs, None, 8, mesh)

    assert found(torch.OutOfMemoryError("simulated")) == 2
    assert found(RuntimeError(said("CUBLAS_STATUS_ALLOC_FAILED"))) == 2
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        found(RuntimeError(said("CUBLAS_STATUS_NOT_SUPPORTED")))
    # With experts on other ranks, these wait in this rank's forward.
    mesh.groups = ONE.groups | {"ep": object()}
    with pytest.raises(ValueError, match="type --micro_batch_size=4, or less"):
        found(torch.OutOfMemoryError("simulated"))


@pytest.mark.slow
def test_a_rank_that_owns_nothing_trains_on(tmp_path, text):
    more = [
        "--n_layer=1",
        "--precision=fp64",
        "--batch_size=9",
        "--clip_value=0.01",
        "--optim=adamw",
        "--steps=3",
    ]
    go(text, tmp_path / "one", *more)
    for layout in ("zero1", "zero3"):
        run_ranks(9, on_ranks, text, tmp_path / layout, *more, f"--data_parallel={layout}")
        close(rows(tmp_path / layout), rows(tmp_path / "one"), 1e-10)


def test_no_room_for_a_mapped_file_is_a_sentence(tmp_path, monkeypatch):
    assert mapped_file(tmp_path / "new" / "a", 10, torch.float64).shape == (10,)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        OSError, match="no room for offloaded weights: one more file needs 80 bytes"
    ):
        mapped_file(tmp_path / "b", 10, torch.float64)
    assert not Path(tmp_path / "b").exists()


def test_the_vocabulary_is_no_matter_of_the_layout():
    sizes = [auto.with_vocabulary(parse.parse([f"--tp={tp}"]), 250).vocab_size for tp in (1, 2, 4)]
    assert sizes == [256] * 3
    with pytest.raises(
        ValueError, match="tp=3 does not divide vocab_size=256; try --vocab_size=258"
    ):
        auto.with_vocabulary(parse.parse(["--tp=3", "--n_head=3", "--n_embd=12"]), 250)


def test_flags_with_nothing_to_do_are_named(tmp_path, text, capsys):
    for flag, says in (
        ("--data_parallel=zero2", "one replica, nothing to spread"),
        ("--offload=cpu", "in this memory already"),
        ("--activation_checkpoint=offload", "in host memory already"),
        ("--diloco_every=5", "does not divide steps=12"),
    ):
        go(text, tmp_path / flag[2:6], flag)
        assert says in capsys.readouterr().out
        assert not (tmp_path / flag[2:6] / "offload").exists()


@pytest.mark.parametrize(
    "words, replicas, layout",
    [
        ([], True, "zero1"),
        (["--optim=soap"], True, "zero1"),
        (["--optim=shampoo"], True, "zero1"),
        (["--optim=adamw"], True, "ddp"),
        (["--optim=lamb"], True, "ddp"),
        ([], False, "auto"),
        (["--compress=topk"], True, "ddp"),
        (["--diloco_every=3"], True, "ddp"),
        (["--data_parallel=ddp"], True, "ddp"),
        (["--optim=adamw", "--data_parallel=zero1"], True, "zero1"),
    ],
)
def test_replicas_deal_out_what_is_too_much_work_to_repeat(words, replicas, layout):
    cfg = parse.parse(words)
    assert (
        auto.resolve_auto(cfg, CPU, optimizers.find_optimizer(cfg.optim), replicas).data_parallel
        == layout
    )


@pytest.mark.parametrize(
    "words, ranks, said",
    [
        (["--optim=muon", "--data_parallel=ddp"], 2, "--data_parallel=zero1 deals them out"),
        (["--optim=adamw", "--data_parallel=ddp"], 2, None),
        (["--optim=muon", "--data_parallel=ddp"], 1, None),
        (["--data_parallel=ddp", "--compress=topk"], 2, None),
        (["--data_parallel=zero1"], 2, None),
        (["--data_parallel=zero1"], 1, "one replica, nothing to spread"),
        (["--data_parallel=zero3", "--compile=max-autotune"], 2, "--compile=default is faster"),
        (["--data_parallel=zero3", "--compile=default"], 2, None),
        (["--data_parallel=zero1", "--compile=reduce-overhead"], 2, None),
        ([], 1, None),
    ],
)
def test_a_layout_that_does_not_pay_is_named(words, ranks, said):
    mesh = types.SimpleNamespace(
        sizes={"dp": ranks, "cp": 1},
        device=CPU,
        groups={"dp_cp": object() if ranks > 1 else None},
    )
    remarks = announce.warnings(parse.parse(words), mesh, None, None)
    remarks = [x for x in remarks if "diloco" not in x and "busy" not in x]
    assert remarks == [] if said is None else said in " ".join(remarks)


def test_the_kernel_of_adamw_is_no_part_of_a_run_and_other_options_are(tmp_path, text):
    more = ["--optim=adamw", "--precision=fp64", "--schedule=constant"]
    go(text, tmp_path / "one", *more, "--steps=4")
    for steps, fused in ((2, []), (3, ["--opt.fused=true"]), (4, [])):
        go(text, tmp_path / "two", *more, *fused, f"--steps={steps}")
        saved = load.newest(tmp_path / "two")
        assert saved.tree("optim/groups/matrix/fused") == (True if fused else None)
    close(rows(tmp_path / "two"), rows(tmp_path / "one"), 1e-12)
    with pytest.raises(ValueError, match="two holds a run without --opt.eps; leave it out"):
        go(text, tmp_path / "two", *more, "--opt.eps=1e-5", "--steps=5")


def test_the_layout_chosen_is_said_saved_and_gone_on_with(tmp_path, text, capfd):
    more = ["--precision=fp64", "--steps=4"]
    go(text, tmp_path / "one", *more)
    run_ranks(2, on_ranks, text, tmp_path / "two", *more, "--steps=2", "--schedule=constant")
    assert "2 ranks: dp 2; zero1" in capfd.readouterr().out
    assert load.newest(tmp_path / "two").tree("config/data_parallel") == "zero1"
    # Alone, and then two again
    go(text, tmp_path / "two", *more, "--schedule=constant", "--steps=3")
    run_ranks(2, on_ranks, text, tmp_path / "two", *more, "--schedule=constant")
    assert load.newest(tmp_path / "one").tree("config/data_parallel") == "auto"
    go(text, tmp_path / "still", *more, "--schedule=constant")
    close(rows(tmp_path / "two"), rows(tmp_path / "still"), 1e-10)


BASE = ["--data_parallel=fsdp", "--fsdp_shard=2", "--reshard=false"]


@pytest.mark.parametrize(
    "saved, now, expected",
    [
        (BASE, ["--data_parallel=ddp"], {"fsdp_shard": None, "reshard": True}),
        (
            ["--compress=powersgd", "--compress.rank=2"],
            ["--schedule=linear"],
            {"options": {"compress.rank": 2}},
        ),
        (["--compress=powersgd", "--compress.rank=2"], ["--compress=none"], {"options": {}}),
        (
            ["--diloco_every=2", "--diloco.lr=1"],
            ["--schedule=linear"],
            {"options": {"diloco.lr": 1}},
        ),
    ],
)
def test_a_branch_inherits_what_belongs_to_what_it_keeps(saved, now, expected):
    old = parse.to_dict(parse.parse(saved))
    new = resume.continued(parse.parse(["--resume=there", *now]), old, branch=True)
    assert {name: getattr(new, name) for name in expected} == expected


def test_an_outer_step_cannot_change_on_the_way():
    old = parse.to_dict(parse.parse(["--diloco_every=2", "--diloco.lr=1"]))
    with pytest.raises(ValueError, match="diloco.lr"):
        resume.continued(parse.parse(["--diloco_every=2"]), old, branch=False)


@pytest.mark.parametrize(
    "flags_, says",
    [
        (
            ["--compress=topk", "--data_parallel=zero1"],
            "compress does not work with data_parallel=zero1",
        ),
        (["--fsdp_shard=2"], "fsdp_shard does not work with data_parallel=auto"),
        (["--offload_params=disk"], "--data_parallel=zero3 or --data_parallel=fsdp"),
        (["--data_parallel=fsdp", "--bucket_mb=1"], "bucket_mb does not work"),
        (["--compress.rank=2"], "needs --compress="),
        (["--compress=topk", "--diloco_every=2"], "are incompatible"),
        (["--tp=3"], "tp=3 does not divide n_head=4, and a head is not split; --tp="),
        (["--tp=2", "--n_kv_head=1"], "does not divide n_kv_head=1"),
        (["--sp=true"], "type --tp=2"),
        (["--cp=3"], "try --block_size=258"),
        (["--cp=2", "--tp=2", "--sp=true", "--block_size=30"], "try --block_size=32"),
        (["--cp=3", "--cp_attention=ulysses", "--block_size=255"], "type --cp_attention=ring"),
        (["--pp=5"], "try --pp=4"),
        (["--pp=4", "--pp_schedule=interleaved"], "need 8 layers, n_layer is 4; try --pp=2"),
        (["--pp=2", "--pp_chunks=2"], "type --pp_schedule=interleaved --pp_chunks=2"),
        (["--pp=2", "--pp_schedule=interleaved", "--pp_chunks=1"], "or leave pp_chunks out"),
        (["--data_parallel=zero2", "--tp=2"], "type --data_parallel=fsdp or zero1"),
        (["--data_parallel=zero3", "--pp=2"], "type --data_parallel=fsdp or zero1"),
        (
            ["--data_parallel=fsdp", "--pp=2", "--pp_schedule=zerobubble"],
            "or --data_parallel=zero1",
        ),
        (
            ["--activation_checkpoint=every_2", "--pp=2", "--pp_schedule=zerobubble"],
            "--activation_checkpoint=every_2 is incompatible with --pp_schedule=zerobubble, which "
            "keeps activations for the weights' gradients; type --pp_schedule=1f1b",
        ),
        (["--compress=topk", "--tp=2"], "is incompatible with tp"),
        (["--diloco_every=2", "--cp=2"], "is incompatible with cp"),
    ],
)
def test_mixes_that_cannot_be_are_refused_with_the_alternative(flags_, says):
    with pytest.raises(ValueError) as error:
        parse.parse(flags_)
    assert says in str(error.value)


def test_an_option_that_counts_takes_whole_numbers_alone(tmp_path, text):
    cfg = parse.parse(flags(text, tmp_path, "--compress=powersgd", "--compress.rank=2.5"))
    with pytest.raises(ValueError, match="rank=2.5 is of the wrong kind"):
        resolve_options(cfg, SGD)


@pytest.mark.parametrize(
    "optim, zero",
    [
        ("muon", True),
        ("soap", True),
        ("pmuon", True),
        ("shampoo", True),
        ("sgd", True),
        ("schedule_free.SGDScheduleFree", True),
        ("adamw", False),
        ("adam_l2", False),
        ("lion", False),
        ("muown", False),
        ("schedule_free", False),
        ("lars", False),
        ("lamb", False),
        ("adafactor", False),
    ],
)
def test_adam_and_its_kind_start_without_zeros_if_nothing_else_is_said(optim, zero):
    found = optimizers.find_optimizer(optim)
    for words, expected in (([], zero), (["--zero_init=true"], True), (["--arch=gpt2"], False)):
        cfg = parse.parse([f"--optim={optim}", *words])
        assert auto.resolve_auto(cfg, torch.device("cpu"), found, False).zero_init is expected


# ---- a file of one's own in optim/ ---------------------------------------------------------------
@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Puts a file into an optim/ of its own, which is looked into instead of the real one."""
    written = []
    (tmp_path / "optim").mkdir()
    monkeypatch.setattr(optim, "__path__", [str(tmp_path / "optim")])

    def write(code, name="mine"):
        (tmp_path / "optim" / f"{name}.py").write_text(code)
        written.append(f"optim.{name}")

    yield write
    for name in written:
        sys.modules.pop(name, None)


NADAM = "import torch\nclass Mine(torch.optim.NAdam):\n    def __init__(self, params, "
DEFAULTS = (
    "\n        defaults = torch.optim.NAdam([torch.zeros(1)]).defaults | {'lr': lr}\n"
    "        torch.optim.Optimizer.__init__(self, params, defaults)"
)
WORKS = {
    "imported": "from torch.optim import NAdam",
    "imported as something else": "from torch.optim import NAdam as Theirs\nAgain = Theirs",
    "beside its base": "from torch.optim import NAdam, Optimizer",
    "its own class first": (
        "from torch.optim import SGD\n" + NADAM + "lr=1.0, weight_decay=0.5):\n"
        "        super().__init__(params, lr, weight_decay=weight_decay)"
    ),
    "options": NADAM + "**options):\n        super().__init__(params, **options)",
    "by keyword alone": (
        NADAM + "*, lr=1.0, weight_decay=0.5):\n"
        "        super().__init__(params, lr, weight_decay=weight_decay)"
    ),
    "no default": NADAM + "lr):\n        super().__init__(params, lr)",
    "no default, by keyword alone": NADAM + "*, lr):\n        super().__init__(params, lr)",
    "None": NADAM + "lr=None):" + DEFAULTS,
    "torch's mark": (
        "from torch.optim.optimizer import required\n" + NADAM + "lr=required):" + DEFAULTS
    ),
    "hidden": NADAM + "**options):\n        super().__init__(params, options['lr'])",
    "no default for either": (
        NADAM
        + "lr, weight_decay):\n        super().__init__(params, lr, weight_decay=weight_decay)"
    ),
}


@pytest.mark.parametrize("what", WORKS)
def test_any_class_in_a_file_trains_with_the_lr_and_the_decay_asked_for(what, drop, tmp_path, text):
    more = [
        "--n_layer=1",
        "--steps=2",
        "--save_every=0",
        "--eval_every=0",
        "--schedule=constant",
        "--plot=false",
        "--lr=0.01",
        "--weight_decay=0.1",
    ]
    drop(WORKS["imported"], "plain")
    go(text, tmp_path / "expected", "--optim=plain", *more)
    drop(WORKS[what])
    go(text, tmp_path / "out", "--optim=mine", *more)
    assert trace(tmp_path / "out") == trace(tmp_path / "expected")


def test_what_a_constructor_cannot_do_without_it_gets_and_the_class_stays_itself(drop):
    drop(WORKS["no default for either"])
    cfg = parse.parse(["--optim=mine", "--lr=0.2", "--weight_decay=0.3", "--precision=fp32"])
    found = optimizers.find_optimizer("mine")
    found.elementwise, found.eval = True, None  # what layouts ask it for
    made, shards = build.optimizer_factory(cfg, ONE, {}, found)
    group = made([torch.zeros(1, requires_grad=True)]).param_groups[0]
    assert (group["lr"], group["weight_decay"], shards) == (0.2, 0.3, {})
    assert issubclass(made, found) and made.__name__ == "Mine"
    cfg = parse.parse(["--optim=sgd", "--precision=fp32"])
    assert build.optimizer_factory(cfg, ONE, {}, SGD) == (SGD, {})


def own(optim, *words):
    cfg, found = parse.parse([f"--optim={optim}", *words]), optimizers.find_optimizer(optim)
    resolve_options(cfg, found)
    return auto.resolve_auto(cfg, CPU, found, False)


def test_what_the_command_leaves_open_is_the_classes_own(drop):
    drop("from torch.optim import Rprop")  # which knows no decay
    assert (own("mine").lr, own("mine").weight_decay, own("mine").head_lr) == (0.01, 0.0, 0.01)
    assert own("mine", "--weight_decay=0", "--lr=0.5").weight_decay == 0.0
    drop("from torch.optim import *", "many")
    assert own("many.AdamW").weight_decay == 0.01 and own("many.SGD").lr == 0.001
    assert own("many.SGD", "--opt.momentum=0.9", "--opt.foreach=false").lr == 0.001
    values = "{'lr': 0.3, 'weight_decay': 0.2}"
    drop(NADAM + f"**more):\n        super().__init__(params, **{values} | more)", "hidden")
    assert (own("hidden").lr, own("hidden").weight_decay) == (0.3, 0.2)


BARE = "import torch\nclass Mine(torch.optim.Optimizer):\n    def __init__(self, params, "
NONE = "\n        super().__init__(params, {'lr': lr})"
FAILS = [
    ("from not_there import Prodigy", [], "mine.py imports not_there, which is not installed; t"),
    ("from torch.optim import Prodigy", [], "cannot be imported: ImportError: cannot import name"),
    ("x = 1 +", [], "cannot be imported: SyntaxError"),
    ("x = y", [], "NameError: name 'y' is not defined; python -m optim.mine shows the line"),
    ("raise OSError('no\\nCUDA')", [], "cannot be imported: OSError: no CUDA;"),
    ("", [], "optim/mine.py has no optimizer; define or import a class there"),
    ("from torch.optim import Optimizer", [], "optim/mine.py has no optimizer"),
    (
        "import torch\nclass Mine:\n    pass\ndef make(ps): return torch.optim.SGD(ps)",
        [],
        "derived from torch.optim.Optimizer",
    ),
    (
        "from torch.optim import NAdam, RAdam",
        [],
        "imports NAdam, RAdam; type one, such as --optim=mine.NAdam",
    ),
    *(
        (WORKS[what], [], "Mine has no default for lr; type one, such as --lr=1e-3")
        for what in ("no default", "no default, by keyword alone", "None", "hidden", "torch's mark")
    ),
    (WORKS["no default for either"], ["--lr=1"], "no default for weight_decay; type one, such as"),
    (
        "from torch.optim import Rprop",
        ["--weight_decay=0.1"],
        "Rprop has no weight decay; leave --weight_decay=0.1 out",
    ),
    (BARE + "decay=1):\n        super().__init__(params, {})", [], "Mine has no lr in its groups"),
    (BARE + "lr=1, weight_decay=1):" + NONE, ["--weight_decay=2"], "leave --weight_decay=2 out"),
    (BARE + "total, lr=1):" + NONE, [], "argument: 'total'; --lr= and --opt.NAME= give it"),
    (BARE + "lr=1):\n        pass", [], "Mine cannot take {}: AttributeError"),
    (BARE + "lr=1):\n        raise KeyError('no\\nCUDA')", [], "cannot take {}: KeyError: 'no"),
    (BARE + "lr=1):\n        raise ValueError('no\\nCUDA')", [], "no CUDA"),
    ("from torch.optim import NAdam", ["--opt.betass=0.9,0.9"], "did you mean --opt.betas?"),
    ("from torch.optim import NAdam", ["--opt.betas=0.9,2.0"], "Invalid beta"),
    ("from torch.optim import NAdam", ["--momentum_warmup=3"], "has no momentum to warm up"),
    ("from torch.optim import NAdam", ["--momentum_cooldown=3"], "has no momentum to cool down"),
]


@pytest.mark.parametrize("code, words, says", FAILS, ids=[code[-40:] for code, _, _ in FAILS])
def test_what_a_file_lacks_is_said_in_a_sentence(code, words, says, drop):
    drop(code)
    with pytest.raises(ValueError) as error:
        cfg = own("mine", *words)
        build.optimizer_factory(cfg, ONE, {}, optimizers.find_optimizer("mine"))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "code",
    [
        NADAM + "**options):\n        super().__init__(params, **options)",
        NADAM + "betas, **options):\n        super().__init__(params, betas=betas, **options)",
        NADAM + "*, betas, lr=1):\n        super().__init__(params, lr, betas=betas)",
    ],
    ids=["hidden", "no default and hidden", "no default"],
)
def test_options_that_a_signature_hides_or_has_no_default_for_reach_the_class(code, drop):
    drop(code)
    cfg = parse.parse(["--optim=mine", "--opt.betas=0.5,0.6", "--lr=0.01"])
    found = optimizers.find_optimizer("mine")
    assert optimizers.trial(cfg, found)[0]["betas"] == (0.5, 0.6)
    for word, says in (
        ("--opt.betass=0.5,0.6", "betass"),
        ("--opt.lr=1", "has no such argument"),
        ("--opt.params=1", "has no such argument"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            own("mine", "--lr=0.01", word)
        assert "\n" not in str(error.value)


# ---- what stands in one place --------------------------------------------------------------------
@pytest.mark.parametrize(
    "code, zero_init, heavy_step, mup_rule",
    [
        ("from torch.optim import AdamW", False, False, "adam"),
        ("from torch.optim import SGD", True, False, "sgd"),
        ("from torch.optim import Muon", True, True, "muon"),
        ("from torch.optim import Adafactor", False, False, None),
        ("from torch.optim import NAdam", True, False, None),
        ("import optim.soap\nclass Mine(optim.soap.SOAP): pass", True, True, "soap"),
        (
            "import torch\nclass Mine(torch.optim.SGD): zero_init, mup_rule = False, 'adam'",
            False,
            False,
            "adam",
        ),
    ],
)
def test_a_class_that_does_not_say_is_taken_for_ours_of_its_name(
    code, zero_init, heavy_step, mup_rule, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.setattr(optim, "__path__", [*optim.__path__, str(tmp_path)])
    sys.modules.pop("optim.mine", None)
    found = optimizers.find_optimizer("mine")
    said = [attribute(found, name) for name in ("zero_init", "heavy_step", "mup_rule")]
    assert said == [zero_init, heavy_step, mup_rule]
    # How its code takes parameters a name does not say: torch's own know no use_muon
    assert attribute(found, "matrices_only") is False
    sys.modules.pop("optim.mine")


def test_every_optimizer_says_what_it_is_in_its_own_file():
    for name, cls in own_classes().items():
        for said in (*ASSUMED, "elementwise", "state_numbers"):
            above = [c for c in cls.__mro__ if c.__module__ == cls.__module__]
            assert said == "matrices_only" or any(said in vars(c) for c in above), (name, said)


def test_settings_and_the_table_of_precisions_agree():
    """settings/ imports no torch, so it repeats names."""
    assert {*typing.get_args(fields.TYPES["precision"])} == {"auto", *amp.PRECISIONS}
    for name, row in amp.PRECISIONS.items():
        for option, allowed in (
            ("--scaler.window=9", row.loss_scaling),
            ("--fp8.scaling=tensor", row.fp8_blocks),
            ("--compress=topk", not (row.loss_scaling or row.stochastic)),
            ("--diloco_every=2", not (row.loss_scaling or row.stochastic)),
        ):
            words = [f"--precision={name}", option]
            if allowed:
                parse.parse(words)
            else:
                with pytest.raises(ValueError, match="precision="):
                    parse.parse(words)


def test_settings_take_the_schedules_from_their_file():
    names = ("auto", *schedules.SHAPES)
    assert typing.get_args(fields.TYPES["schedule"]) == names
    for name in schedules.SHAPES:
        if name == "wsd":
            parse.parse([f"--schedule={name}", "--decay_frac=0.3"])
        else:
            with pytest.raises(ValueError, match=f"no meaning for schedule={name}"):
                parse.parse([f"--schedule={name}", "--decay_frac=0.3"])
        if name == "constant":
            with pytest.raises(ValueError, match="which never decays"):
                parse.parse([f"--schedule={name}", "--min_lr_frac=0.3"])
        else:
            parse.parse([f"--schedule={name}", "--min_lr_frac=0.3"])
    for name in schedules.SHAPES:
        same = [schedules.multiplier(name, 50, steps, warmup=5) for steps in (90, 100)]
        assert schedules.is_endless(name) == (same[0] == same[1]) or name == "wsd"


def test_settings_import_no_torch():
    code = "import sys, settings.parse; sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    assert run.returncode == 0


SMALL = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=8, vocab_size=16)


@pytest.mark.parametrize(
    "words, keeps",
    [
        (["--precision=bf16"], False),
        (["--precision=bf16", "--steps=7"], True),  # a small model's copies are not worth it
        (["--precision=bf16", "--pp=2", "--pp_schedule=zerobubble"], True),
        (["--precision=bf16", "--compile=default"], True),
    ],
)
def test_under_autocast_no_copies_of_weights_are_kept_but_by_those_who_take_products_apart(
    words, keeps, monkeypatch
):
    copies = 2 * sum(p.numel() for p in GPT(GPTConfig(**SMALL)).parameters())
    least = copies + 1 if "--steps=7" in words else copies
    monkeypatch.setattr(build, "WORTH_A_FUNCTION", least)
    cfg = fields.update(parse.parse(words), compile="default" if "compile" in words[-1] else "off")
    model = GPT(GPTConfig(**SMALL))
    build.convert_linears(cfg, {}, model, torch.device("cpu"))
    shapes = []

    def pack(x):
        shapes.append((tuple(x.shape), x.dtype))
        return x

    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.zeros(1, 4, dtype=torch.long))
    assert (((8, 32), torch.bfloat16) in shapes) == keeps
