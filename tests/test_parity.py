"""The parity oracle names the first tensor that differs, and why; where none does it is silent.

Faults: in a plain torch model (parity_plain.py), switched on; in this project, patches (faults/).
A few of each here, all of them with -m slow.
"""

import json
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import copies
import pytest
import safetensors.torch
import torch
import torch._dynamo  # noqa: F401  (once here, not in every forked rank)
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from parity_plain import Model, Plan, sound, train

from memory.meter import Meter
from model import GPT, GPTConfig
from parity import record as recorder_file
from parity.__main__ import main as parity_main
from parity.compare import Comparison
from parity.diagnose import diagnose
from parity.parts import counts
from parity.record import record
from parity.recording import Recording

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "faults"))

import plant  # noqa: E402

BIG = "blocks.1.up.weight"
MATRIX = "shard_as_matrix"
# Plan of the fault; kind and name of the first tensor that differs; cause.
FAULTS = [
    (dict(fault="not_summed", at=BIG), "gradient", BIG, "not_summed"),
    (dict(fault="not_summed", at="blocks.0.norm1.weight", ranks=4), "gradient", "", "not_summed"),
    (dict(fault="not_summed", at="tokens.weight", micro=2), "gradient", "", "not_summed"),
    (dict(fault="not_summed_all"), "gradient", "head.weight", "not_summed"),
    (dict(fault="mean"), "gradient", "head.weight", "not_summed"),
    (dict(fault="mean_one", at="blocks.0.q.bias", ranks=4), "gradient", "", "not_summed"),
    (dict(fault="mean", shards=True, optimizer="sgd"), "gradient", "head.weight", "not_summed"),
    (dict(fault="rank_left_out", at=BIG, ranks=4), "gradient", BIG, "not_summed"),
    (dict(fault="scaled_by_micro", ranks=1, micro=4), "output", "(loss)", "not_summed"),
    (dict(fault="summed_twice", at=BIG), "gradient", BIG, "summed_twice"),
    (dict(fault="summed_twice", at="norm.bias", ranks=4), "gradient", "", "summed_twice"),
    (dict(fault="own_twice", at="blocks.0.v.weight"), "gradient", "", "summed_twice"),
    (dict(fault="bias_twice", at="blocks.1.down"), "output", "", "summed_twice"),
    (dict(fault="local_means", ignore=True), "output", "(loss)", "mean_of_means"),
    (dict(fault="local_means", ignore=True, ranks=1, micro=4), "output", "(loss)", "mean_of_means"),
    (dict(fault="tied_head_detached", tied=True), "gradient", "tokens.weight", "half_tied"),
    (dict(fault="tied_embedding_detached", tied=True), "gradient", "tokens.weight", "half_tied"),
    (dict(fault="stale_weight", at=BIG), "weight", BIG, "stale"),
    (dict(fault="stale_gradient", at="blocks.0.q.weight"), "gradient", "", "stale"),
    (dict(fault="old_weight", at="blocks.1.up"), "output", "", "stale"),
    (dict(fault="old_weight", at="blocks.0.q", ranks=1), "output", "", "stale"),
    (dict(fault="not_cleared"), "gradient", "head.weight", "stale"),
    (dict(fault="gradient_shards_swapped", at=BIG), "gradient", BIG, "wrong_order"),
    (dict(fault="weights_shards_swapped", at="tokens.weight"), "weight", "", "wrong_order"),
    (dict(fault="weights_transposed", at="blocks.0.out.weight"), "weight", "", "wrong_order"),
    (dict(fault="weights_heads_swapped", at="blocks.0.q.weight"), "weight", "", "heads"),
    (dict(fault="heads_swapped", at="blocks.0"), "output", "blocks.0.heads", "heads"),
    (dict(fault="heads_interleaved", at="blocks.1"), "output", "blocks.1.heads", "heads"),
    (dict(fault="weights_halves_swapped", at="blocks.1.k.weight"), "weight", "", "rotary"),
    (dict(fault="weights_neighbours", at="blocks.1.q.weight"), "weight", "", "rotary"),
    (dict(fault="rotary_sign", at="blocks.0.rotary_q"), "output", "", "rotary"),
    (dict(fault="rotary_neighbours", at="blocks.1.rotary_k"), "output", "", "rotary"),
    (dict(fault="rotary_halves", at="blocks.0.rotary_k"), "output", "", "rotary"),
    (dict(fault="positions", at="blocks.0.rotary_q"), "output", "", "position"),
    (dict(fault="positions_late", at="blocks.1.rotary_q"), "output", "", "position"),
    (dict(fault="learned_positions", position="learned"), "output", "positions", "position"),
    (dict(fault="micro_lost", micro=2), "gradient", "head.weight", "micro_batch"),
    (dict(fault="no_accumulation", at=BIG, ranks=1, micro=4), "gradient", BIG, "micro_batch"),
    (dict(fault="backward_skipped", micro=2), "output_gradient", "head", "micro_batch"),
    (dict(fault="samples_of_rank_0"), "input", "(0)", "wrong_samples"),
    (dict(fault="masks_by_rank", at="blocks.1.mask", dropout=0.2), "output", "", "random"),
    (dict(fault="weights_drawn_anew", at="blocks.0.up.weight"), "weight", "", "random"),
    (dict(fault="local_norm", clip=0.05, shards=True), "clipped", "head.weight", "local_norm"),
    (dict(fault="local_norm", clip=0.05, shards=True, norm=True), "norm", "", "local_norm"),
    (dict(fault="clipped_one_by_one", clip=0.05), "clipped", "head.weight", "local_norm"),
    (dict(fault="clipped_before_sum"), "gradient", "head.weight", "local_norm"),
    (dict(fault="no_decay", at=BIG), "weight", BIG, "weight_decay"),
    (dict(fault="decay_twice", at="all"), "weight", "tokens.weight", "weight_decay"),
    (dict(fault="decay_grows", at="norm.weight"), "weight", "", "weight_decay"),
    (dict(fault="decay_late", at=BIG), "weight", BIG, "weight_decay"),
    (dict(fault="decay_without_lr", at=BIG, optimizer="sgd"), "weight", BIG, "weight_decay"),
    (dict(fault="step_count", at="all"), "weight", "tokens.weight", "bias_correction"),
    (dict(fault="no_first_correction", at=BIG), "weight", BIG, "bias_correction"),
    (dict(fault="no_second_correction", at=BIG), "weight", BIG, "bias_correction"),
    (dict(fault="shard_muon", at=BIG, optimizer="muon", shards=True), "weight", BIG, MATRIX),
    (dict(fault="shard_norms", at=BIG, optimizer="lamb", shards=True), "weight", BIG, MATRIX),
    (dict(fault="bf16_product", at="blocks.0.up"), "output", "", "low_precision"),
    (dict(fault="fp32_product", at="blocks.1.q"), "output", "", "low_precision"),
    (dict(fault="bf16_inputs", at="blocks.0.down"), "output", "", "low_precision"),
    (dict(fault="tf32_product", at="blocks.0.out"), "output", "", "low_precision"),
    (dict(fault="bf16_sum"), "gradient", "head.weight", "low_precision"),
    (dict(fault="weights_bf16", at="blocks.0.up.weight"), "weight", "", "low_precision"),
    (dict(fault="bf16_inputs", dtype=torch.float32), "output", "blocks.1.up", "low_precision"),
    (dict(fault="nan", at=BIG), "gradient", BIG, "nonfinite"),
]  # fmt: skip
# What no hypothesis explains: another answer than "I do not know" would be wrong.
STRANGE = [
    dict(fault="relu", at="blocks.0"),
    dict(fault="norm_eps"),
    dict(fault="no_scale", at="blocks.1"),
    dict(fault="swapped_k_v", at="blocks.0"),
    dict(fault="sees_the_future", at="blocks.0"),
    dict(fault="label_smoothing"),
    dict(fault="no_bias", at="blocks.1.up"),
    dict(fault="half_input", at="blocks.1.up"),
    dict(fault="l2", at=BIG),
    dict(fault="beta2", at=BIG),
    dict(fault="sign", at=BIG),
    dict(fault="noise", at=BIG),
]


def found(plan: Plan, folder: Path):
    """What parity says of a planted fault: (difference, finding), or None."""
    train(sound(plan), folder / "a")
    train(plan, folder / "b")
    comparison = Comparison(Recording(folder / "a"), Recording(folder / "b"))
    first = comparison.first()
    if first is None:
        return None
    return first, diagnose(comparison, first)


def check(settings: dict, kind: str, name: str, cause: str, folder: Path) -> None:
    plan = Plan(**settings)
    first, finding = found(plan, folder)
    assert first.key[1] == kind, (first, finding)
    wanted = name or plan.at
    assert first.key[2] == wanted or kind == "norm", (first, finding)
    assert finding.cause == cause, (first, finding)


def title(case) -> str:
    settings = case[0] if isinstance(case, tuple) else case
    return "-".join(str(value) for key, value in settings.items() if key in ("fault", "at"))


def some(cases: list, often: int) -> list:
    """One in `often` of them always, the others with -m slow."""
    marked = []
    for i, case in enumerate(cases):
        marks = () if i % often == 0 else pytest.mark.slow
        marked.append(pytest.param(case, id=title(case), marks=marks))
    return marked


@pytest.mark.parametrize("case", some(FAULTS, 7))
def test_a_fault_in_a_plain_torch_model_is_named(case, tmp_path):
    check(*case, tmp_path)


@pytest.mark.parametrize("settings", some(STRANGE, 6))
def test_a_fault_of_another_kind_is_not_given_a_wrong_cause(settings, tmp_path):
    first, finding = found(Plan(**settings), tmp_path)
    assert finding.cause == "unknown", (first, finding)


SOUND = [
    dict(),
    dict(ranks=4, micro=2),
    dict(tied=True, optimizer="sgd", clip=0.05),
    dict(shards=True, dropout=0.2),
    dict(ignore=True, position="learned", dtype=torch.float32, micro=4),
]


@pytest.mark.parametrize("settings", some(SOUND, 4))
def test_a_sound_run_on_several_ranks_is_no_alarm(settings, tmp_path):
    assert found(Plan(**settings), tmp_path) is None


class Deep(torch.nn.Module):
    """60 layers that magnify what goes in; with `halves` each product is the sum of two."""

    def __init__(self, halves: bool):
        super().__init__()
        torch.manual_seed(0)
        self.halves = halves
        self.layers = torch.nn.ModuleList(Layer(halves) for _ in range(60))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(torch.nn.Module):
    def __init__(self, halves: bool):
        super().__init__()
        self.halves = halves
        self.weight = torch.nn.Parameter(torch.randn(32, 32) * 1.7 / 32**0.5)

    def forward(self, x):
        if not self.halves:
            return torch.tanh(x @ self.weight.T)
        left, right = x.chunk(2, -1)
        return torch.tanh(left @ self.weight[:, :16].T + right @ self.weight[:, 16:].T)


def test_rounding_that_grows_with_depth_is_no_fault(tmp_path):
    """Its size depends on the machine's kernels: mostly it is named, and never is anything else."""
    causes = []
    for seed in range(5):
        for name, halves in (("a", False), ("b", True)):
            recorder = record(Deep(halves), tmp_path / f"{name}{seed}")
            torch.manual_seed(seed)
            recorder.model(torch.randn(16, 32)).square().sum().backward()
            recorder.close()
        recordings = [Recording(tmp_path / f"{name}{seed}") for name in "ab"]
        comparison = Comparison(*recordings)
        first = comparison.first()
        assert first.key[2] not in ("layers.0", "layers.1")
        causes.append(diagnose(comparison, first).cause)
    assert {*causes} <= {"rounding", "unknown"} and causes.count("rounding") >= 3


class Summed(torch.nn.Module):
    """An embedding, and a loss that is summed and large. lost: the embedding returns zeros."""

    def __init__(self, lost: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(8, 4, dtype=torch.bfloat16)
        if lost:
            self.embed.register_forward_hook(lambda module, args, y: y * 0)

    def forward(self, tokens):
        return self.embed(tokens).abs().sum() * 1000


def test_a_summed_loss_is_no_measure_for_activations(tmp_path):
    for name, lost in (("a", False), ("b", True)):
        recorder = record(Summed(lost), tmp_path / name)
        recorder.model(torch.arange(8).view(2, 4)).backward()
        recorder.close()
    comparison = Comparison(Recording(tmp_path / "a"), Recording(tmp_path / "b"))
    first = comparison.first()
    assert first.key == (1, "output", "embed") and first.relative == 1


def edit(folder: Path, rank: int, keep) -> None:
    """Leaves the lines for which keep(fact) is true."""
    path = folder / f"rank_{rank}.jsonl"
    lines = [line for line in path.read_text().splitlines() if keep(json.loads(line))]
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def pair():
    """Recordings a, of one process, and b, of two ranks; a test makes copies."""
    with tempfile.TemporaryDirectory() as folder:
        train(sound(Plan()), Path(folder, "a"))
        train(Plan(), Path(folder, "b"))
        yield Path(folder)


def copied(pair: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_what_no_rank_has_is_a_difference(pair, tmp_path):
    a, b = copied(pair, tmp_path)
    edit(Path(b), 1, lambda fact: fact.get("kind") != "input")
    comparison = Comparison(Recording(a), Recording(b))
    first = comparison.first()
    assert first.key == (1, "input", "(0)") and first.why.startswith("no rank has")
    assert diagnose(comparison, first).cause == "micro_batch"


def no_activations(fact: dict) -> bool:
    return not fact.get("kind", "").startswith("output")


def no_loss(fact: dict) -> bool:
    return fact.get("name") != "(loss)"


def one_step(fact: dict) -> bool:
    return fact.get("step", 0) <= 1


@pytest.mark.parametrize(
    "keep, said",
    [
        (no_activations, "B has no output; B has no output_gradient"),
        (no_loss, "B has no output of (loss)"),
        (one_step, "B ends after step 1"),
    ],
)
def test_what_b_lacks_is_no_agreement(keep, said, pair, tmp_path, capsys):
    folders = copied(pair, tmp_path)
    for rank in (0, 1):
        edit(tmp_path / "b", rank, keep)
    assert parity_main(folders) == 1
    out = capsys.readouterr().out
    assert (
        said in out and "tensors are compared" in out and "all " not in out.replace("not all", "")
    )
    assert parity_main([*folders, "--json"]) == 1
    fact = json.loads(capsys.readouterr().out)
    assert fact["cause"] is None and fact["compared"] < fact["of"] and said in fact["lacking"]


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def of_another_model(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        text = path.read_text().replace("blocks.", "h.").replace('"norm', '"ln')
        path.write_text(text.replace('"tokens', '"wte'))


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda b: (b / "rank_1.jsonl").unlink(), "of 2 ranks 1 is missing"),
        (lambda b: (b / "rank_0.jsonl").unlink(), "of 2 ranks 0 is missing"),
        (lambda b: cut(b / "rank_0.0.safetensors"), "rank_0.0.safetensors cannot be read"),
        (lambda b: (b / "rank_1.0.safetensors").unlink(), "rank_1.0.safetensors cannot be read"),
        (lambda b: cut(b / "rank_1.jsonl"), r"rank_1.jsonl, line \d+, cannot be read"),
        (lambda b: cut(b / "rank_1.jsonl", 0), "rank_1.jsonl is empty"),
        (shutil.rmtree, "b: no recording there"),
        (of_another_model, "another model, or --names"),
    ],
)
def test_a_bad_recording_is_a_sentence(damage, sentence, pair, tmp_path):
    folders = copied(pair, tmp_path)
    damage(tmp_path / "b")
    with pytest.raises(ValueError, match=sentence) as caught:
        parity_main(folders)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--stepz=2"], "--stepz=2 says nothing about two recordings"),
        (["--ranks=2"], "--ranks=2 says nothing"),
        (["another"], "3 recordings"),
        (["--names=map.toml"], "matches no name"),
    ],
)
def test_words_beside_two_recordings_are_refused(words, sentence, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("map.toml").write_text('[names]\n"decoder.*" = "blocks.*"\n')
    with pytest.raises(ValueError, match=sentence):
        parity_main([str(pair / "a"), str(pair / "b"), *words])


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "it has none"),
        ("[names", "wants a TOML file"),
        ("[names]\na = 3", "is no name"),
        ('[names]\na = "b.*"', "has more"),
    ],
)
def test_a_bad_map_of_names_is_a_sentence(text, sentence, tmp_path):
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parity_main(["a", "b", f"--names={path}"])


# ---- mistakes in recording -----------------------------------------------------------------------
class MeanLoss(torch.nn.Module):
    def __init__(self, has_loss: bool):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(4, 6)
        self.down = torch.nn.Linear(6, 1)
        self.has_loss = has_loss

    def forward(self, x):
        y = self.down(torch.tanh(self.up(x)))
        return y.square().mean() if self.has_loss else y


def replicas(folder: Path, ranks: int, numbers=None, spoil=None, has_loss=False, **arguments):
    """Means over each rank's samples, averaged. numbers(rank) -> what recorder.batch is told."""
    samples = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    models = [MeanLoss(has_loss).double() for _ in range(ranks)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    recorders = []
    for rank, (model, optimizer, x) in enumerate(zip(models, optimizers, samples.chunk(ranks))):
        axes = {"dp": (ranks, rank)}
        recorder = record(model, folder, optimizer, rank=rank, axes=axes, **arguments)
        recorders.append(recorder)
        if numbers is not None:
            recorder.batch(numbers(rank), of=8)
        y = model(x)
        (y if has_loss else y.square().mean()).backward()
    for together in zip(*(model.parameters() for model in models)):
        mean = torch.stack([p.grad for p in together]).mean(0)
        for p in together:
            p.grad = mean.clone()
            if spoil is not None:
                spoil(p.grad)
    for optimizer, recorder in zip(optimizers, recorders):
        optimizer.step()
        recorder.close()


def right_numbers(rank: int):
    return range(4 * rank, 4 * rank + 4)


def noisy(gradient: torch.Tensor) -> None:
    torch.manual_seed(2)
    gradient *= 1 + torch.rand(gradient.shape).double()


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(numbers=right_numbers, backward_scale=0.5), "all 16 tensors agree"),
        (dict(numbers=right_numbers), "record with backward_scale=1/2"),
        (dict(numbers=right_numbers, has_loss=True), "record with backward_scale=1/2"),
        (dict(numbers=right_numbers, has_loss=True, backward_scale=0.5), "all 17 tensors agree"),
        (dict(backward_scale=0.5), "0's samples are unnamed: call recorder.batch(numbers, of=8)"),
        (
            dict(numbers=lambda rank: range(4), backward_scale=0.5),
            "ranks 0 and 1 (dp) both compute the samples [0..3]; nobody computes [4..7]\n"
            "look at: which samples each rank takes; or recorder.batch was given",
        ),
        (
            dict(numbers=right_numbers, backward_scale=0.5, spoil=noisy),
            "forward and backward are right on every rank",
        ),
    ],
)
def test_a_mistake_in_recording_is_told_from_a_fault(settings, said, tmp_path, capsys):
    replicas(tmp_path / "a", 1, has_loss=settings.get("has_loss", False))
    replicas(tmp_path / "b", 2, **settings)
    parity_main([str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert said in out
    assert "agree (" in out or out.startswith("B has 2 ranks: dp 2; the oracle A has 1 rank\n")


def test_all_axes_of_a_size_are_named():
    piece = SimpleNamespace(rank=0, part="rank 0, backward 2")
    b = SimpleNamespace(ranks=range(4), entries={(1, "part", "w"): [piece]})
    case = SimpleNamespace(step=1, axes={"dp": 2, "tp": 2}, b=b)
    named = counts(case)
    assert named[2] == "2 dp ranks or 2 tp ranks or 2 micro-batches"
    assert named[8] == "2 dp ranks x 2 tp ranks x 2 micro-batches"


# ---- faults of ours ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tree():
    with tempfile.TemporaryDirectory() as folder:
        yield plant.copy_of_tree(Path(folder).resolve())


def test_every_patch_fits_and_no_fault_is_there_twice(tree):
    faults = plant.faults()
    assert {fault.patch for fault in faults} == set(plant.HERE.glob("*.patch"))
    assert len(faults) >= 20 and len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        plant.patched(tree, fault, check=True)


FAST = ("tp_no_sum_backward", "pp_tied_half", "moe_local_counts")

SAID = {
    "ep_bias_each_micro_batch": "adds another bias to the scores than that of the step's start",
    "ep_counts_of_tp_ranks_twice": "on every rank each token counts 2 times",
    "ep_experts_exchanged": "rank 0 has in the place of expert 0 of blocks.0.mlp what is",
    "ep_gradients_over_all_replicas": "the gradient of blocks.1.mlp's expert 1 is in it, too",
    "moe_bias_of_skipped_step": "step 5 is skipped, and on every rank the bias moves",
    "moe_bias_of_local_counts": "by the counts of its own tokens alone",
    "moe_counts_of_one_micro_batch": "the counts of micro-batch 4 alone",
    "moe_sequence_loss_of_micro_batch": "each micro-batch for one sequence",
    "moe_term_by_micro_batches": "z_loss is 1/4 of the right one, and there are 4 micro-batches",
    "moe_term_by_ranks": "sequence_loss is 2 times the right one, and there are 2 dp ranks",
    "moe_term_without_loss_scale": "z_loss lacks the loss scale 65536",
    "moe_shared_twice": "the output of blocks.0.mlp.shared.proj is in it 2 times",
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=() if fault.name in FAST else pytest.mark.slow)
        for fault in plant.faults()
    ],
)
def test_a_fault_of_ours_is_named_by_the_command(fault, tree):
    status, text = plant.look(tree, fault, ["--json"])
    assert plant.verdict(fault, status, text) == ""
    assert SAID.get(fault.name, "") in json.loads(text)["sentence"]


# ---- the command ---------------------------------------------------------------------------------
def command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "parity", *argv], cwd=ROOT, capture_output=True, text=True
    )


def test_exit_status_and_report(tmp_path, capsys):
    train(sound(Plan()), tmp_path / "a")
    train(Plan(), tmp_path / "b")
    train(Plan(fault="mean"), tmp_path / "c")
    assert parity_main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "tensors agree" in capsys.readouterr().out
    assert parity_main([str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cause"] is None
    assert parity_main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    said = capsys.readouterr().out
    assert "gradient of head.weight, in step 1" in said and "B is 0.5 times A" in said
    assert "likely: not summed" in said and "look at: the all-reduce" in said


def test_names_of_another_trainer_are_mapped(tmp_path, capsys):
    train(sound(Plan()), tmp_path / "a")
    train(Plan(), tmp_path / "b")
    for path in (tmp_path / "b").glob("*.jsonl"):
        text = path.read_text().replace('"blocks.', '"model.layers.')
        path.write_text(text.replace(".up", ".mlp.fc1"))
    names = tmp_path / "map.toml"
    names.write_text("""[names]
"model.layers.*.mlp.fc1" = "blocks.*.up"
"model.layers.*" = "blocks.*"
""")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert parity_main(folders) == 1
    assert "missing" in capsys.readouterr().out
    assert parity_main([*folders, f"--names={names}"]) == 0


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--tp=3"], "n_head"),
        (["--tpp=2"], "no field 'tpp'"),
        (["--tp=2", "--ranks=x"], "--ranks=x"),
        (["--tp=2", "--pp=2"], '"--tp=2 --pp=2" as one word'),
        (["--tp=2", "--names=nowhere.toml"], "nowhere.toml"),
        (["--tp=2", "--keep="], "--keep= lacks its value"),
        (["nowhere", "b"], "nowhere: no recording there"),
    ],
)
def test_a_mistake_is_a_sentence(argv, sentence):
    with pytest.raises(ValueError, match=sentence):
        parity_main(argv)


def test_the_default_recipe_is_no_alarm_in_float32(capsys):
    assert parity_main(["--tp=2", "--precision=fp32", "--steps=1"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_mistake_has_exit_status_2():
    ended = command("--tp=3")
    assert ended.returncode == 2 and ended.stderr.startswith("parity: ")
    assert ended.stderr.count("\n") == 1


# ---- the recorder --------------------------------------------------------------------------------
def test_the_files_are_safetensors_and_hold_what_was_computed(tmp_path):
    plan = Plan(ranks=1, steps=1)
    train(plan, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rank_0.jsonl").read_text().splitlines()]
    tensors = safetensors.torch.load_file(tmp_path / "rank_0.0.safetensors")
    pieces = [line for line in lines if "kind" in line]
    assert len(tensors) == len(pieces)
    kinds = {line["kind"] for line in pieces}
    assert kinds == {"weight", "input", "output", "output_gradient", "part", "gradient"}
    start = next(line for line in pieces if line["name"] == "head.weight")
    torch.manual_seed(1)
    assert torch.equal(tensors[start["key"]], Model(plan).to(plan.dtype).head.weight)


def test_evaluation_and_recomputation_are_not_recorded(tmp_path):
    from torch.utils.checkpoint import checkpoint

    inner = torch.nn.Linear(4, 4)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False).sum()

    recorder = record(Net(), tmp_path)
    with torch.no_grad():
        recorder.model(torch.randn(2, 4))
    recorder.model(torch.randn(2, 4)).backward()
    recorder.close()
    recording = Recording(tmp_path)
    assert len(recording.entries[1, "output", "inner"]) == 1
    assert len(recording.entries[1, "output_gradient", "inner"]) == 1


def test_the_recorder_works_copied_alone(tmp_path):
    ended = copies.run_copy(ROOT, "parity/record.py", recorder_file.__doc__, tmp_path)
    assert ended.loaded == {"parity/record.py"} and ended.out.endswith("lines\n")


def test_the_recorder_runs_its_example_under_another_name(tmp_path):
    shutil.copyfile(ROOT / "parity" / "record.py", tmp_path / "copied.py")
    ended = copies.in_child(
        tmp_path, lambda: runpy.run_path(str(tmp_path / "copied.py"), run_name="__main__")
    )
    assert ended.out.endswith("lines\n")


def test_two_processes_do_not_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    record(torch.nn.Linear(2, 2), tmp_path).close()
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["rank_1.jsonl"]
    with pytest.raises(ValueError, match="is there already"):
        record(torch.nn.Linear(2, 2), tmp_path)


# ---- what recording costs ------------------------------------------------------------------------
def gpt_steps(folder: Path, recorded: bool, n: int, width: int = 64) -> list[float]:
    """Seconds of each of n steps of a GPT, recorded or not."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=3, n_embd=width, block_size=64))
    optimizer = torch.optim.AdamW(gpt.parameters(), foreach=False)
    recorder = record(gpt, folder, optimizer) if recorded else None
    tokens = torch.randint(256, (8, 64))
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        (gpt(tokens, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    if recorder is not None:
        recorder.close()
    return seconds


def test_recording_holds_one_tensor_at_a_time(tmp_path):
    peaks = []
    for recorded in (False, True):
        with Meter() as meter:
            gpt_steps(tmp_path, recorded, 2)
        peaks.append(meter.peak)
    widest = 8 * 64 * 256 * 4  # of the MLP, and the logits
    # A norm with a hook keeps its result, which layers/recompute.py would compute again.
    norms = 6 * 8 * 64 * 64 * 4
    assert peaks[1] <= peaks[0] + widest + norms


@pytest.mark.slow
def test_a_recorded_step_takes_at_most_three_times_as_long(tmp_path):
    bare = statistics.median(gpt_steps(tmp_path, False, 12, 128)[2:])
    recorded = statistics.median(gpt_steps(tmp_path, True, 12, 128)[2:])
    assert recorded <= 3 * bare, (recorded, bare)
