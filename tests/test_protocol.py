"""Every data-parallel layout has all that parallel/protocol.py names, and nobody asks whether it
has."""

import ast
import copy
import functools
import inspect
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import product_files, run_ranks

from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from optim.schedule_free import AdamWScheduleFree
from optim.sgd import SGD
from parallel import compression
from parallel.ddp import DDP, AllReduce
from parallel.diloco import DiLoCo
from parallel.fsdp import FSDP
from parallel.protocol import DataParallel
from parallel.zero import ZeRO

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ATTRIBUTES = set(DataParallel.__annotations__)
METHODS = {n: m for n, m in vars(DataParallel).items() if not n.startswith("_") and callable(m)}
LAYOUTS = {
    "ddp": DDP,
    "compressed": lambda *where: DDP(*where, reduce=compression.topk(fraction=0.5)),
    "zero1": functools.partial(ZeRO, stage=1),
    "zero2": functools.partial(ZeRO, stage=2),
    "zero3": functools.partial(ZeRO, stage=3),
    "fsdp": FSDP,
    "diloco": functools.partial(DiLoCo, every=3),
}
CLASSES = {"DDP", "ZeRO", "FSDP", "DiLoCo", "AllReduce", "Compressor"}
COMPRESSORS = {
    "none": AllReduce,
    "topk": compression.topk,
    "sign": compression.sign,
    "onebit": compression.onebit,
    "powersgd": compression.powersgd,
    "fp16": compression.fp16,
    "bf16": compression.bf16,
}
ASKED_OF_COMPRESSORS = ("__call__", "forget", "discard_step", "state_dict", "load_state_dict")
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def parameters(method) -> list[tuple]:
    """(name, kind, has a default) of each, for whoever calls it by position or by name."""
    found = inspect.signature(method).parameters.values()
    return [(p.name, p.kind, p.default is not p.empty) for p in found]


def lacking(layout) -> list[str]:
    """What the protocol names and this layout has not, or takes other arguments for."""
    wrong = [n for n in sorted(ATTRIBUTES | METHODS.keys()) if not hasattr(layout, n)]
    for name in METHODS.keys() - set(wrong):
        if parameters(getattr(type(layout), name)) != parameters(METHODS[name]):
            wrong.append(name)
    return wrong


# ---- one replica ---------------------------------------------------------------------------------
@every_layout
def test_a_layout_has_all_of_the_protocol(name):
    layout = LAYOUTS[name](None, CPU)
    assert isinstance(layout, DataParallel) and lacking(layout) == []
    assert all(type(getattr(layout, n)) is bool for n in ("is_primary", "backward_is_collective"))
    assert layout.shards == {} and layout.sent_bytes == 0 and not layout.backward_is_collective


def test_the_protocol_names_what_a_run_calls():
    """Each name behind `replicas.` in the programs that train."""
    asked = set()
    for path in ("train.py", "checkpoint/state.py", "run/batch.py", "memory/meter.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and "replicas" in (
                getattr(node.value, "id", None),
                getattr(node.value, "attr", None),
            ):
                asked.add(node.attr)
    assert asked == ATTRIBUTES | METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_layout_without_a_method_is_none(name):
    class Part:
        pass

    for other in (ATTRIBUTES | METHODS.keys()) - {name}:
        setattr(Part, other, METHODS.get(other))
    assert not isinstance(Part(), DataParallel) and name in lacking(Part())
    setattr(Part, name, lambda self, another: None)
    assert isinstance(Part(), DataParallel) and name in lacking(Part())


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressor_has_what_ddp_asks_of_it(name):
    reduce = COMPRESSORS[name]()
    for method in ASKED_OF_COMPRESSORS:
        asked = parameters(getattr(AllReduce, method))
        assert parameters(getattr(type(reduce), method)) == asked, method
    assert reduce.forget(["w"]) is None and reduce.discard_step() is None
    tree = reduce.state_dict(0, 1)
    if tree:
        reduce.load_state_dict(reader(tree), 0, 1)
    assert reduce.state_dict(0, 1) == tree


def test_averages_weights_are_those_of_schedule_free():
    model = torch.nn.Linear(2, 2)
    for cls in (SGD, torch.optim.AdamW, torch.optim.LBFGS):
        assert not param_groups.averages_weights(cls)
        assert not param_groups.averages_weights(cls(model.parameters(), lr=0.1))
    assert param_groups.averages_weights(AdamWScheduleFree)
    assert param_groups.averages_weights(AdamWScheduleFree(model.parameters(), lr=0.1))
    assert param_groups.sent_bytes(torch.optim.AdamW(model.parameters())) == 0


# ---- two ranks -----------------------------------------------------------------------------------
class Collectives(torch.utils._python_dispatch.TorchDispatchMode):
    """How many this rank starts."""

    def __enter__(self):
        self.n = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


SHAPE = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=8, block_size=8, vocab_size=16)


def whole_run(rank, world, name):
    """Each method once, in the order of a run; what a rank finds of the protocol's promises."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SHAPE)).double()
    layout = LAYOUTS[name](dist.group.WORLD, CPU)
    found = {"lacking": lacking(layout), "is": isinstance(layout, DataParallel)}
    model = layout.parallelize(model)
    layout.init_weights(lambda n, shape: initial_weight(model.config, n, shape) + 0.01)
    lrs = dict.fromkeys(("matrix", "embedding", "head", "scalar"), 0.1)
    optimizer = layout.make_optimizer(SGD, param_groups.param_groups(model, lrs, 0.0))
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(rank))

    def backward(is_last):
        layout.last_micro_batch(is_last)
        (model(tokens[:, :-1], tokens[:, 1:]) / 64).backward()

    def here():
        return {n: local(w).clone() for n, w in layout.weights().items()}

    with Collectives() as seen:
        backward(False)
    found["sends in backward"], found["said"] = seen.n > 0, layout.backward_is_collective
    backward(True)
    layout.finish_gradients()
    squares = sum(float(g.square().sum()) for g in layout.gradients().values())
    found["here"], found["squares"] = squares, squares if layout.is_primary else 0.0
    found["gradients"], found["is_primary"] = [*layout.gradients()], layout.is_primary
    start = here()
    assert layout.discard_step() is None
    found["kept"] = same(here(), start)
    optimizer.step()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in params]
    with layout.outer_weights():
        found["outer"] = all(map(torch.equal, params, trained))
    found["kept"] &= all(map(torch.equal, params, trained))
    layout.broadcast_weights()
    optimizer.zero_grad(set_to_none=True)
    assert layout.gradients() == {}, "the optimizer's own zero_grad leaves none behind"
    model.zero_grad(set_to_none=True)
    found["model"] = {n: (w.numel(), w.shape) for n, w in here().items()}
    state = {n: {"rank": torch.tensor(rank)} for n in found["gradients"]}
    entry = layout.state_dict(state)
    found["entry"] = type(entry)
    found["sent"] = type(layout.sent_bytes), layout.sent_bytes + param_groups.sent_bytes(optimizer)
    if entry is not None:
        before = copy.deepcopy(entry)
        found["own"] = [*layout.load_state_dict(reader(entry))]
        assert same(layout.state_dict(state), before)
    else:
        found["own"] = [*layout.load_state_dict(lambda path: {})]
    found["lacking"] += lacking(layout)
    return found


def local(w):
    return w.to_local() if hasattr(w, "placements") else w.detach()


def reader(entry):
    return lambda path: functools.reduce(
        lambda tree, key: tree.get(key, {}), path.split("/"), entry
    )


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@functools.cache
def ranks_of(name):
    return run_ranks(2, whole_run, name)


@every_layout
def test_on_two_ranks_it_keeps_what_the_protocol_says(name):
    for found in ranks_of(name):
        assert found["is"] and found["lacking"] == [] and found["kept"]
        assert found["outer"] == (name != "diloco")  # its replicas part between outer steps
        assert found["sends in backward"] == found["said"] == (name in ("zero2", "zero3", "fsdp"))
        entries = {"ddp": dict, "compressed": dict, "diloco": dict}
        assert found["entry"] is entries.get(name, type(None))
        assert found["own"] == (found["gradients"] if name == "diloco" else [])
        assert found["sent"][0] is int and (found["sent"][1] > 0) == (name != "diloco")


@every_layout
def test_primary_ranks_hold_each_gradient_once(name):
    """Their squares add up to those of the plain all-reduce; DiLoCo's replicas have their own."""
    ranks = ranks_of(name)
    squares = sum(found["squares"] for found in ranks)
    if name in ("diloco", "compressed"):
        assert squares > 0 and ranks[0]["is_primary"]
        assert ranks[1]["is_primary"] == (name == "diloco")
        return
    assert squares == pytest.approx(ranks_of("ddp")[0]["here"], rel=1e-12)


@every_layout
def test_all_ranks_together_bring_each_weight_once(name):
    elements = {}
    for found in ranks_of(name):
        for n, (numel, _) in found["model"].items():
            elements[n] = elements.get(n, 0) + numel
    whole = {n: numel for n, (numel, _) in ranks_of("ddp")[0]["model"].items()}
    assert elements == whole and len(whole) > 5


# ---- nobody asks ---------------------------------------------------------------------------------
NAMES = ATTRIBUTES | METHODS.keys() | set(ASKED_OF_COMPRESSORS) - {"__call__"}
OPTIMIZERS = {"train", "eval", "sent_bytes"}
# The function that asks, and files which import nothing of optim/ and look at any class
MAY_ASK_OPTIMIZERS = {
    "optim/param_groups.py",
    "parallel/replicas.py",
    "parallel/diloco.py",
    "hooks/wear.py",
    "hooks/ema.py",
    "hooks/ema_nesterov.py",
    "memory/meter.py",
}


def is_call(node, *names: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) in names


def is_class(node) -> bool:
    return isinstance(node, ast.Constant) and node.value in CLASSES


def guards(source: str, path: str = "train.py") -> list[str]:
    """Lines that ask a layout whether it has a name of the protocol, which class it is by a string,
    or what its repr is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asked = is_call(node, "hasattr") or is_call(node, "getattr") and len(node.args) == 3
        names = NAMES - OPTIMIZERS if path in MAY_ASK_OPTIMIZERS else NAMES | OPTIMIZERS
        if asked and getattr(node.args[1], "value", None) in names:
            found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
        if isinstance(node, ast.Compare):
            by_name = any(is_class(x) for x in ast.walk(node))
            if by_name or any(is_call(x, "repr") for x in (node.left, *node.comparators)):
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
        if isinstance(node, ast.MatchValue) and is_class(node.value):
            found.append(f"{path}:{node.lineno} case {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        'if hasattr(replicas, "discard_step"): pass',
        'own = getattr(self.replicas, "outer_weights", nullcontext)()',
        'sent = getattr(pipe, "sent_bytes", 0)',
        'if hasattr(optimizer, "train"): optimizer.train()',
        'kind = type(replicas).__name__\nspread = kind == "FSDP" or kind == "ZeRO" and stage > 1',
        'x = replicas.__class__.__name__ in ("FSDP", "ZeRO")',
        'match type(replicas).__name__:\n    case "FSDP":\n        pass',
        'bad = any("deferred" in repr(m.matmul) for m in modules)',
    ],
)
def test_the_search_finds_such_a_guard(source):
    assert len(guards(source)) >= 1


def test_the_search_leaves_others_alone():
    for source in (
        'y = hasattr(p, "placements")',
        'f = getattr(dist, "all_gather_single", None)',
        'f = getattr(module, "weights")',
        'print(f"{cls.__name__}", repr(x))',
        'layout = cfg.data_parallel == "fsdp"',
    ):
        assert guards(source) == [], source
    assert guards('hasattr(cls, "eval")', "parallel/diloco.py") == []


def test_nobody_asks_a_layout_what_it_has():
    files = product_files()
    assert len(files) > 100
    found = []
    for path in files:
        source = path.read_text(encoding="utf-8")
        found += guards(source, path.relative_to(ROOT).as_posix())
    assert found == []
