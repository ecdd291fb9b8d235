"""Optimizer state on the host or in files: the same steps, in chunks, bit for bit."""

import contextlib
import errno
import importlib
import io
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import fitted, gpu, run_ranks
from test_optim_contract import CASES, build, every, give_gradients, parameters, steps, tensors
from torch.optim.lr_scheduler import LinearLR

from memory import offload as module
from memory.offload import offload
from model import GPT, GPTConfig, initial_weight
from optim import adafactor, adamw, lion, muon, schedule_free
from optim.param_groups import param_groups

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks into /proc, which Linux has"
)
SHAPES = ((6, 4), (4, 6), (5,), (2, 3, 4), (), (6, 4), (6, 4), (7,), (1,))
CPU = torch.device("cpu")
where = pytest.mark.parametrize("where", ["cpu", "disk"])
chunk_mb = pytest.mark.parametrize("chunk_mb", [1e-6, 2e-4])  # one parameter each, a few


def pair(cls, where, tmp_path, chunk_mb=2e-4, dtype=torch.float32, shapes=SHAPES, device=CPU):
    """(parameters, plain optimizer), (the same parameters, offloaded optimizer)"""
    plain, ours = (parameters(dtype, shapes, device) for _ in range(2))
    return (plain, build(cls, plain)), (
        ours,
        offload(build(cls, ours), where, tmp_path, device, chunk_mb),
    )


def assert_same(a, b):
    """Parameters, state and groups of two (parameters, optimizer), bit for bit."""
    (ps, plain), (qs, ours) = a, b
    assert all(torch.equal(p, q) for p, q in zip(ps, qs))
    assert len(plain.state) == len(ours.state)
    for p, q in zip(ps, qs):
        assert plain.state.get(p, {}).keys() == ours.state.get(q, {}).keys()
        for name, x in plain.state.get(p, {}).items():
            y = ours.state[q][name]
            if torch.is_tensor(x):
                assert torch.equal(x.cpu(), y.cpu()) and x.stride() == y.stride(), name
            else:
                assert x == y, name
    for g, h in zip(plain.param_groups, ours.param_groups, strict=True):
        assert len(g["params"]) == len(h["params"])
        assert {**g, "params": 0} == {**h, "params": 0}


def maps() -> dict[int, str]:
    """Start address -> the file mapped there."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    return {int(line[0].split("-")[0], 16): line[5] for line in lines if len(line) > 5}


@every
@where
@chunk_mb
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_equal_plain_steps_bit_for_bit(cls, where, chunk_mb, dtype, tmp_path):
    a, b = pair(cls, where, tmp_path, chunk_mb, dtype)
    for t in range(6):
        for params, optimizer in (a, b):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9  # a schedule, through the groups
            give_gradients(params, t)
            params[0].grad = None if t in (0, 3) else params[0].grad  # its state comes late
            optimizer.step()
    assert_same(a, b)
    if hasattr(a[1], "eval"):
        for change in ("eval", "train", "eval"):
            getattr(a[1], change)()
            getattr(b[1], change)()
            assert_same(a, b)


@pytest.mark.parametrize(
    "cls",
    [
        gpu(torch.optim.AdamW),
        gpu(torch.optim.SGD),
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.Adagrad,
        gpu(torch.optim.Adafactor),
        torch.optim.RAdam,
    ],
)
@where
def test_torchs_own_optimizers_fit(cls, where, tmp_path, device):
    runs = []
    for offloaded in (False, True):
        params = parameters(shapes=SHAPES, device=device)
        optimizer = cls(params, lr=0.01, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
        optimizer = offload(optimizer, where, tmp_path, device, 2e-4) if offloaded else optimizer
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        for t in range(6):
            give_gradients(params, t)
            optimizer.step()
            scheduler.step()
        runs.append((params, optimizer))
    assert_same(*runs)


@where
def test_strided_parameters_keep_their_order_in_memory(where, tmp_path):
    def strided(params):
        params[1] = params[1].detach().T.contiguous().T.requires_grad_()  # columns first
        return params

    runs = []
    for offloaded in (False, True):
        params = strided(parameters(shapes=((8, 6), (40, 30), (8, 6))))
        optimizer = build([cls for cls in CASES if cls.__name__ == "LAMB"][0], params)
        optimizer = offload(optimizer, where, tmp_path, CPU, 1e-6) if offloaded else optimizer
        steps(optimizer, params, range(6))
        runs.append((params, optimizer))
    assert runs[1][1].state[params[1]]["exp_avg"].stride() == (1, 40)
    assert_same(*runs)


@where
def test_step_hooks_run_once_and_may_change_gradients(where, tmp_path):
    params, calls = parameters(), []
    optimizer = build(adamw.AdamW, params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre, registered before"))
    offload(optimizer, where, tmp_path, CPU, 1e-6)

    def pre(optimizer, args, kwargs):
        calls.append(
            ("pre", [len(g["params"]) for g in optimizer.param_groups], len(optimizer.state))
        )

    def post(optimizer, args, kwargs):
        calls.append(
            ("post", [len(g["params"]) for g in optimizer.param_groups], len(optimizer.state))
        )

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(post)
    steps(optimizer, params, range(1))
    n = len(params)
    assert calls == ["pre, registered before", ("pre", [n], 0), ("post", [n], n)]


@where
def test_the_chunks_are_small_and_each_sees_only_its_own(where, tmp_path, monkeypatch):
    params = parameters(shapes=((10, 10),) * 6)
    optimizer, seen = build(adamw.AdamW, params), []
    plain = adamw.AdamW.step.__wrapped__

    def watched(self):
        ps = self.param_groups[0]["params"]
        seen.append(len(ps))
        assert set(self.state) <= set(ps)
        return plain(self)

    monkeypatch.setattr(adamw.AdamW.step, "__wrapped__", watched)
    offload(optimizer, where, tmp_path, CPU, 1000 / 2**20)  # two of 400 bytes
    steps(optimizer, params, range(2))
    assert seen == [2, 2, 2] * 2
    assert len(optimizer.state) == 6 and optimizer.param_groups[0]["params"] == params


@where
def test_the_closure_runs_once_with_grad(where, tmp_path):
    params, calls = parameters(shapes=((3, 3),) * 3), []
    optimizer = offload(build(adamw.AdamW, params), where, tmp_path, CPU, 1e-6)

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [True] and loss.item() > 0 and optimizer.step() is None


@where
def test_without_parameters_a_step_is_none(where, tmp_path):
    optimizer = schedule_free.AdamWScheduleFree([{"params": []}, {"params": []}])
    optimizer = offload(optimizer, where, tmp_path, CPU)
    optimizer.train()
    optimizer.step()
    assert [group["k"] for group in optimizer.param_groups] == [0, 0]
    assert all(group["train_mode"] for group in optimizer.param_groups)


class Counting(torch.optim.SGD):
    """Counts in its groups, as some do."""

    def step(self, closure=None):
        for group in self.param_groups:
            if any(p.grad is not None for p in group["params"]):
                group["t"] = group.get("t", 0) + 1
                group["rest"] = group.get("rest", 8) / 2
        return super().step(closure)


def with_counts(make):
    """Two runs of Schedule-Free and of Counting, by make(optimizer, whole or not); parameters join
    late or rest, and Schedule-Free's groups have the largest counts of theirs."""
    for cls, options in ((schedule_free.AdamWScheduleFree, {"warmup_steps": 9}), (Counting, {})):
        runs = []
        for whole in (True, False):
            params = parameters(shapes=((3, 3),) * 4)
            groups = [
                {"params": params[:3], "names": ["a", "b", "c"]},
                {"params": params[3:], "names": ["d"]},
            ]
            optimizer = make(cls(groups, **options), whole)
            getattr(optimizer, "train", lambda: None)()
            for t in range(6):
                optimizer.param_groups[0]["lr"] = 0.1 if t < 5 else 10.0
                give_gradients(params, t)
                params[0].grad = params[0].grad if t < 3 else None
                params[2].grad = params[2].grad if t > 2 else None
                optimizer.step()
            runs.append((params, optimizer))
            if cls is Counting:
                assert [(g["t"], g["rest"]) for g in optimizer.param_groups] == [(6, 0.125)] * 2
            else:
                assert optimizer.param_groups[0]["lr_max"] == pytest.approx(10 * 6 / 9)
                assert optimizer.state[params[2]]["lr_max"] == pytest.approx(10 * 3 / 9)
        yield runs


@where
def test_what_a_group_counts_is_the_same_in_chunks(where, tmp_path):
    for runs in with_counts(
        lambda o, whole: o if whole else offload(o, where, tmp_path, CPU, 1e-6)
    ):
        assert_same(*runs)


@where
@pytest.mark.parametrize("before", [True, False])
def test_schedulers_may_come_before_or_after_and_say_nothing(where, before, tmp_path):
    runs = []
    for offloaded in (False, True):
        params = parameters()
        optimizer = build(adamw.AdamW, params)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = LinearLR(optimizer) if before else None
            optimizer = offload(optimizer, where, tmp_path, CPU, 1e-6) if offloaded else optimizer
            scheduler = scheduler or LinearLR(optimizer)
            for t in range(4):
                steps(optimizer, params, [t])
                scheduler.step()
        runs.append((params, optimizer))
    assert_same(*runs)
    with pytest.raises(ValueError, match="replaced"):
        offload(optimizer, where, tmp_path, CPU)


@where
def test_hooks_of_load_state_dict_see_the_whole_once(where, tmp_path):
    params, copies, seen = parameters(shapes=((4, 4),) * 2), parameters(shapes=((4, 4),) * 2), []
    optimizer = build(adamw.AdamW, params)
    steps(optimizer, params, range(3))
    saved = optimizer.state_dict()
    other = offload(build(adamw.AdamW, copies), where, tmp_path, CPU, 1e-6)
    handles = [
        other.register_load_state_dict_pre_hook(
            lambda _, s: {**s, "state": {1 - i: x for i, x in s["state"].items()}}
        ),
        other.register_load_state_dict_pre_hook(lambda _, s: seen.append(sorted(s["state"]))),
        other.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state))),
    ]
    for _ in range(2):
        other.load_state_dict(saved)
    assert seen == [[0, 1], 2] * 2 and sorted(saved["state"]) == [0, 1]
    for i, p in enumerate(copies):
        assert torch.equal(other.state[p]["exp_avg"], saved["state"][1 - i]["exp_avg"])
    for handle in handles:
        handle.remove()
    other.load_state_dict(saved)
    assert len(seen) == 4
    assert torch.equal(other.state[copies[0]]["exp_avg"], saved["state"][0]["exp_avg"])


def test_an_error_in_a_chunk_leaves_groups_and_state_in_place(tmp_path):
    params = parameters(shapes=((4, 4),) * 4)
    optimizer = offload(build(adamw.AdamW, params), "disk", tmp_path, CPU, 1e-6)
    steps(optimizer, params, range(2))
    groups, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    params[2].grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups is groups and groups[0] is group and group["params"] == params
    assert optimizer.state is state and len(state) == 4


# Muon multiplies matrices of one shape together: a GPU may sum another number of them otherwise.
ON_GPU = (adamw.AdamW, adafactor.Adafactor, lion.Lion, schedule_free.AdamWScheduleFree)


@pytest.mark.parametrize(
    "cls", [gpu(cls) if cls in ON_GPU else cls for cls in CASES], ids=lambda cls: cls.__name__
)
@where
def test_a_resume_through_state_dict_is_bitwise(cls, where, tmp_path, device):
    a, (params, optimizer) = pair(cls, where, tmp_path / "a", device=device)
    steps(a[1], a[0], range(3))
    steps(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [p.requires_grad_() for p in saved["params"]]
    other = offload(build(cls, resumed), where, tmp_path / "b", device, 1e-6)
    other.load_state_dict(saved["optimizer"])
    if where == "disk" and sys.platform.startswith("linux"):
        assert_mapped(other, tmp_path / "b")
    steps(other, resumed, range(3, 6))
    steps(a[1], a[0], range(3, 6))
    assert_same(a, (resumed, other))
    # Off the device between the steps, but for counters of one element
    assert all(x.device == CPU for x in tensors(other) if x.numel() > 1)
    for i, state in saved["optimizer"]["state"].items():  # what was given is not what is stepped
        for name, x in state.items():
            if torch.is_tensor(x) and x.numel() > 1:
                y = other.state[resumed_at(other, i)][name]
                assert x.data_ptr() != y.data_ptr()


def resumed_at(optimizer, index):
    return [p for group in optimizer.param_groups for p in group["params"]][index]


@where
def test_a_plain_state_dict_loads_and_going_back_forgets(where, tmp_path):
    a, b = pair(adamw.AdamW, where, tmp_path)
    steps(a[1], a[0], range(2))
    steps(b[1], b[0], range(5))
    b[1].load_state_dict(a[1].state_dict())
    with torch.no_grad():
        for p, q in zip(a[0], b[0]):
            q.copy_(p)
    for params, optimizer in (a, b):
        steps(optimizer, params, range(2, 4))
    assert_same(a, b)
    saved = a[1].state_dict()
    del saved["state"][1]
    b[1].load_state_dict(saved)
    assert len(b[1].state) == len(a[1].state) - 1 and b[0][1] not in b[1].state
    with pytest.raises(ValueError, match="group"):
        b[1].load_state_dict(build(adamw.AdamW, a[0][:2]).state_dict())


def test_state_there_before_moves_at_once(tmp_path):
    a, (params, optimizer) = (
        ((p := parameters()), build(adamw.AdamW, p)),
        (
            (q := parameters()),
            build(adamw.AdamW, q),
        ),
    )
    steps(a[1], a[0], range(3))
    steps(optimizer, params, range(3))
    offload(optimizer, "disk", tmp_path, CPU, 2e-4)
    if sys.platform.startswith("linux"):
        assert_mapped(optimizer, tmp_path)
    for params, optimizer in (a, (params, optimizer)):
        steps(optimizer, params, range(3, 6))
    assert_same(a, (params, optimizer))


def assert_mapped(optimizer, folder):
    mapped, found = maps(), 0
    for x in tensors(optimizer):
        if x.numel() > 1:
            assert mapped.get(x.untyped_storage().data_ptr(), "no file").startswith(str(folder))
            found += 1
    assert found


@linux
@every
def test_on_disk_every_state_tensor_is_a_mapped_file_and_leaves_no_name(cls, tmp_path):
    params = parameters()
    optimizer = offload(build(cls, params), "disk", tmp_path / "new" / "folder", CPU, 1e-6)
    steps(optimizer, params, range(3))
    assert_mapped(optimizer, tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    before = [x.data_ptr() for x in tensors(optimizer)]
    steps(optimizer, params, range(3))
    assert before == [x.data_ptr() for x in tensors(optimizer)]  # stepped in place


def test_files_of_a_killed_run_are_taken_again(tmp_path):
    for name in ("0.state", "1.state"):
        (tmp_path / name).write_bytes(b"\xff" * 10_000)
    a, b = pair(adamw.AdamW, "disk", tmp_path)
    for params, optimizer in (a, b):
        steps(optimizer, params, range(3))
    assert_same(a, b)
    assert list(tmp_path.iterdir()) == []


def test_where_fallocate_is_missing_files_have_no_holes(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    sizes, plain = [], torch.from_file

    def watched(path, **options):
        sizes.append((os.stat(path).st_size, options["size"]))
        return plain(path, **options)

    monkeypatch.setattr(torch, "from_file", watched)
    a, b = pair(adamw.AdamW, "disk", tmp_path, shapes=((600, 500), (3, 3)))
    for params, optimizer in (a, b):
        steps(optimizer, params, range(2))
    assert_same(a, b)
    assert len(sizes) == 4 and all(size == wanted for size, wanted in sizes)


def full(fd, start, size):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(tmp_path, monkeypatch):
    params = parameters()
    optimizer = offload(build(adamw.AdamW, params), "disk", tmp_path, CPU, 1e-6)
    steps(optimizer, params[:1], range(2))
    saved = {
        name: x.clone() for name, x in optimizer.state[params[0]].items() if torch.is_tensor(x)
    }
    monkeypatch.setattr(module.os, "posix_fallocate", full, raising=False)
    params[0].grad = None
    params[1].grad = torch.ones_like(params[1])
    with pytest.raises(OSError) as error:
        optimizer.step()
    said = str(error.value)
    assert str(tmp_path) in said and "needs 96 bytes" in said and "free" in said and "cpu" in said
    assert "\n" not in said and list(tmp_path.iterdir()) == []
    assert all(torch.equal(optimizer.state[params[0]][name], x) for name, x in saved.items())


def limited(queue, folder):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    params = parameters(shapes=((50, 50), (200, 100)))
    optimizer = offload(build(adamw.AdamW, params), "disk", folder, CPU, 1e-6)
    give_gradients(params, 0)
    try:
        optimizer.step()
    except OSError as error:
        queue.put(str(error))


@linux
def test_a_limit_on_files_is_an_error_and_no_signal(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=limited, args=(queue, tmp_path))
    process.start()
    said = queue.get(timeout=90)
    process.join()
    assert process.exitcode == 0 and "needs 80,000 bytes" in said and str(tmp_path) in said


@pytest.mark.parametrize("where, folder", [("gpu", "x"), ("disk", None)])
def test_another_place_is_refused(where, folder):
    with pytest.raises(ValueError, match="'cpu', or 'disk' and a folder"):
        offload(build(adamw.AdamW, parameters()), where, folder, CPU)


# ---- the streams of a GPU, played by objects that write down what they are asked -----------------
class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.log.append(f"host waits for {self.name}")


def test_on_a_gpu_two_chunks_are_in_flight_and_streams_wait_for_each_other(tmp_path, monkeypatch):
    """No GPU here: x.to() copies as if there were one, and every wait is written down."""
    log, names = [], iter(["in", "out"])
    main = FakeStream("main", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(next(names), log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(
        torch.cuda, "stream", lambda s: contextlib.nullcontext(log.append(f"on {s.name}"))
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x.clone() if args else x)
    kept = "kept until {} is past it".format
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: log.append(kept(s.name)))
    params, plain = parameters(shapes=((10, 10),) * 3), parameters(shapes=((10, 10),) * 3)
    optimizer, reference = (torch.optim.AdamW(ps, foreach=False, lr=0.1) for ps in (params, plain))
    step = torch.optim.AdamW.step.__wrapped__  # what a chunk calls
    monkeypatch.setattr(
        torch.optim.AdamW.step, "__wrapped__", lambda o: (log.append("step"), step(o))[1]
    )
    offload(optimizer, "disk", tmp_path, SimpleNamespace(type="cuda"), 1e-6)
    for t in range(3):
        log.clear()
        steps(optimizer, params, [t])
    for t in range(3):
        steps(reference, plain, [t])
    assert all(torch.equal(p, q) for p, q in zip(params, plain))
    chunk = [
        "main waits for in",
        # The copy on the device, also where the step puts another tensor in its place.
        *[kept("main")] * 2,  # exp_avg and exp_avg_sq
        "step",
        "host waits for out",
        "on in",
        "out waits for main",
        *[kept("out")] * 2,
        "on out",
    ]
    assert log == ["on in", *chunk * 3, "host waits for out"]


# ---- with communication in the hooks -------------------------------------------------------------
def trained(rank, world, layout, cls, folder):
    """Losses and this rank's weights after three steps, in memory and offloaded."""
    runs = []
    for place in (None, "cpu", "disk"):
        config = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=8, vocab_size=16, block_size=8)
        with torch.device("meta"):
            model = GPT(config).double()
        replicas = importlib.import_module("parallel." + layout.rstrip("123"))
        replicas = (
            replicas.FSDP(dist.group.WORLD, CPU)
            if layout == "fsdp"
            else replicas.ZeRO(dist.group.WORLD, CPU, int(layout[-1]))
        )
        model = fitted(replicas, cls, model).parallelize(model)
        replicas.init_weights(lambda name, shape: initial_weight(config, name, shape))
        lrs = dict.fromkeys(("embedding", "head", "matrix", "scalar"), 0.02)
        optimizer = replicas.make_optimizer(
            cls, param_groups(model, lrs, 0.1, muon=getattr(cls, "matrices_only", False))
        )
        if place is not None:
            optimizer = offload(optimizer, place, folder / f"{layout}_{rank}", CPU, 1e-6)
        if hasattr(optimizer, "train"):
            optimizer.train()
        losses = []
        for t in range(3):
            replicas.last_micro_batch(True)
            ids = torch.arange(8).view(1, 8).add(t + rank).remainder(16)
            loss = model(ids, ids)
            loss.backward()
            replicas.finish_gradients()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            losses.append(loss.item())
        weights = [
            w.to_local() if hasattr(w, "to_local") else w for w in replicas.weights().values()
        ]
        runs.append((losses, [w.tolist() for w in weights]))
    return runs


@pytest.mark.parametrize("layout", ["zero1", pytest.param("zero3", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.parametrize("cls", [muon.Muon, schedule_free.AdamWScheduleFree])
def test_under_zero_and_fsdp_offloading_changes_nothing(layout, cls, tmp_path):
    pytest.importorskip("parallel." + layout.rstrip("123"))
    for plain, *offloaded in run_ranks(2, trained, layout, cls, tmp_path):
        assert offloaded == [plain, plain] and len(set(plain[0])) == 3


# ---- memory --------------------------------------------------------------------------------------
def rss_anon() -> int:
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free is not kept for later
    line = [
        s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon")
    ][0]
    return int(line.split()[1]) * 1024


def grown(queue, where, folder):
    """How many bytes of anonymous memory the state of 50 MB of parameters took."""
    params = parameters(shapes=((500, 1000),) * 25)
    optimizer = build(adamw.AdamW, params)
    optimizer = optimizer if where is None else offload(optimizer, where, folder, CPU, 4)
    give_gradients(params, 0)
    before = rss_anon()
    optimizer.step()
    optimizer.step()
    queue.put(rss_anon() - before)


@linux
@pytest.mark.slow
def test_files_take_the_state_out_of_anonymous_memory(tmp_path):
    import multiprocessing

    context, taken = multiprocessing.get_context("fork"), {}
    for place in (None, "cpu", "disk"):
        queue = context.Queue()
        process = context.Process(target=grown, args=(queue, place, tmp_path))
        process.start()
        taken[place] = queue.get(timeout=60) / 1e6
        process.join()
    assert 95 < taken[None] < 115 and 95 < taken["cpu"] < 115 and taken["disk"] < 20
