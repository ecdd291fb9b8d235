"""bench.py train: who runs, in what order, and that the table is made of what the runs wrote."""

import re

import pytest
import torch

import bench
from benchmarks import runs, training
from settings import fields as settings
from settings import parse

FAKE = """
import json, os, pathlib, sys
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
name = "+".join(given[x] for x in ("precision", "compile", "activation_checkpoint"))
with open(given["data"], "a") as file:
    print(name, file=file)
turn = open(given["data"]).read().splitlines().count(name)
if name.startswith("fp64"):
    print("Traceback (most recent call last):", file=sys.stderr)
    print("torch.OutOfMemoryError: a | b is too much", file=sys.stderr)
    print("You can say LOUD=1 to hear more", file=sys.stderr)
    sys.exit(1)
if name.startswith("fp16"):
    os.kill(os.getpid(), 9)
out = pathlib.Path(given["out_dir"])
out.mkdir()
speed = {"fp32": 1000, "bf16": 2000 if turn == 1 else 3000, "fp8": 100}[given["precision"]]
with open(out / "metrics.jsonl", "w") as file:
    for step in range(1, 10):
        now = 1 if step <= 3 else speed * (1 + (step - 6) / 10)
        row = dict(step=step, loss=5 - step / 10, tokens_per_s=now, step_s=64 / now, sent_bytes=0,
                   mfu=None if name.startswith("fp32") else 0.25, peak_bytes=2**20 * (100 + step))
        print(json.dumps(row), file=file)
    print(json.dumps(dict(step=9, event="save")), file=file)
lines = [
    "commit abc, torch x, a CPU, 1 rank(s)", "9 parameters; a step is ..., in micro-batches of 4"
]
lines += ["precision  fp8; FP8 is emulated: ..."] * (given["precision"] == "fp8")
(out / "train.log").write_text("\\n".join(lines))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """train.py's stand-in, which writes down who ran, and is no faster than it says."""
    monkeypatch.setattr(runs, "TRAIN", tmp_path / "fake.py")
    runs.TRAIN.write_text(FAKE)
    return tmp_path / "ran"


def table(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert head == ["", "ratio", "tokens/s", "ms a step", "MFU", "peak MiB", "micro", "loss"]
    assert all(len(row) == len(head) for row in rows)
    return {name: cells for name, *cells in rows}


def test_they_take_turns_and_the_table_has_medians_over_rounds_of_the_median_step(
    fake, tmp_path, capsys
):
    out = tmp_path / "table.md"
    words = ["train", "--only=fp32,bf16,fp8", "--rounds=3", f"--data={fake}", f"--out={out}"]
    assert bench.main(words) == 0
    printed = capsys.readouterr().out
    assert (
        out.read_text() == printed and f"`python bench.py {' '.join(words)}`, commit abc" in printed
    )
    assert fake.read_text().split() == [f"{name}+off+none" for name in ("fp32", "bf16", "fp8")] * 3
    assert table(printed) == {  # steps 4 to 9 have 0.8 to 1.3 of the speed
        "fp32": ["**1.00** (1.00..1.00)", "1,000", "64.0", "unknown", "109", "4", "4.1000"],
        "bf16": ["**3.00** (2.00..3.00)", "3,000", "21.3", "25.0%", "109", "4", "4.1000"],
        "fp8 (emulated)": ["**0.10** (0.10..0.10)", "100", "640.0", "25.0%", "109", "4", "4.1000"],
    }


def test_who_fails_is_a_row_with_its_reason_and_is_not_asked_again(fake, capsys):
    assert bench.main(["train", "--only=fp64,fp16,bf16,fp32", "--rounds=2", f"--data={fake}"]) == 1
    found = table(capsys.readouterr().out)
    assert found["fp64"][0] == "failed: torch.OutOfMemoryError: a / b is too much"
    assert found["fp16"][0] == "failed: no step, and status -9"
    assert [*found] == ["fp64", "fp16", "bf16", "fp32"]
    assert (
        found["bf16"][0] == "**1.00** (1.00..1.00)" and found["fp32"][0] == "**0.42** (0.33..0.50)"
    )
    ran = [name.split("+")[0] for name in fake.read_text().split()]
    assert ran == ["fp64", "fp16", "bf16", "fp32", "bf16", "fp32"]


def test_where_nothing_can_be_compiled_that_is_said_and_else_it_is_compiled(
    fake, capsys, monkeypatch
):
    monkeypatch.setattr(training.compile, "lacking", lambda device: "a compiler is missing")
    assert (
        bench.main(["train", "--only=bf16+default+full,bf16", "--rounds=1", f"--data={fake}"]) == 0
    )
    found = table(capsys.readouterr().out)
    assert found["bf16+default+full"][0] == "skipped: a compiler is missing"
    assert found["bf16"][0] == "**1.00** (1.00..1.00)" and fake.read_text() == "bf16+off+none\n"
    monkeypatch.setattr(training.compile, "lacking", lambda device: None)
    assert bench.main(["train", "--only=bf16+default+full", "--rounds=1", f"--data={fake}"]) == 0
    assert fake.read_text() == "bf16+off+none\nbf16+default+full\n"


@pytest.mark.parametrize(
    "name, fields",
    [
        ("fp32", ("fp32", "off", "none")),
        ("bf16+full", ("bf16", "off", "full")),
        ("fp8+max-autotune+every_2", ("fp8", "max-autotune", "every_2")),
        ("segments_2+default+fp16", ("fp16", "default", "segments_2")),
    ],
)
def test_a_name_says_what_is_on_and_all_else_is_off(name, fields):
    expected = dict(zip(("precision", "compile", "activation_checkpoint"), fields))
    assert training.chosen(name, 4) == expected
    cfg = parse.parse(training.arguments([], training.chosen(name, 4), False))
    assert {field: getattr(cfg, field) or "none" for field in expected} == expected


def test_recipe_then_the_usual_then_the_users_fields_then_the_choice(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'steps = 900\nbatch_size = 6\nprecision = "fp64"\nlog_every = 7\nresume = "x"\n'
    )
    choice = training.chosen("bf16", 4)
    cfg = parse.parse(training.arguments(["--eval_every=5", str(recipe)], choice, False))
    assert (cfg.steps, cfg.batch_size, cfg.precision, cfg.log_every) == (12, 6, "bf16", 1)
    assert (cfg.resume, cfg.eval_every, cfg.save_every, cfg.sample_tokens) == ("never", 5, 0, 0)
    quick = parse.parse(training.arguments([str(recipe), "--steps=3"], choice, True))
    assert (quick.steps, quick.batch_size, quick.n_embd) == (3, 4, 64)


def test_dotted_fields_go_where_they_belong():
    words = ["--fp8.scaling=row", "--compile.dynamic=true", "--scaler.initial=8", "--opt.beta=0.9"]
    for name, taken in ("bf16", ()), ("fp8", (0,)), ("fp8+default", (0, 1)), ("fp16", (2,)):
        given = training.arguments(words, training.chosen(name, 4), True)
        assert [word for word in given if word in words] == [words[i] for i in (*taken, 3)]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--only=full", "no precision"),
        ("--only=bf16+fp32", "two words for precision"),
        ("--only=bf16+ful", "ful is not available"),
        ("--only=bf16+segments_9", "segments_9"),
        ("--rounds=0", "--rounds=0"),
        ("--quick=1", "usage"),
        ("--out=/nowhere/x.md", "no folder /nowhere"),
        ("--precision=fp16", "--only"),
        ("--out_dir=x", "bench's own"),
        ("--n_layr=2", "n_layer"),
        ("--only=bf16 --fp8.scaling=row", "nothing to do with bf16"),
        ("missing.toml", "missing.toml"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(words, said, fake, capsys):
    assert bench.main(["train", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and re.search(said, captured.err)
    assert not fake.exists()


def test_what_is_compared_by_itself_can_be_and_no_field_has_the_name_of_a_flag():
    for name in (training.NAMES + training.ON_GPU + "," + training.IF_QUICK).split(","):
        assert parse.parse(training.arguments([], training.chosen(name, 4), False))
    assert not {*training.FLAGS} & {f"--{field}" for field in settings.FIELDS}


@pytest.mark.slow
def test_quick_end_to_end(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(" ".join(str(i * i) for i in range(9000)))
    words = [
        f"--data={tmp_path / 'text.txt'}",
        f"--data_dir={tmp_path}",
        "--device=cpu",
        "--threads=1",
    ]
    argv = ["train", "--quick", "--rounds=1", "--optim=lamb", "--peak_flops=1e10", *words]
    # One process has nobody to send to
    assert bench.main([*argv, "--only=bf16", "--compress=sign"]) == 1
    assert "failed: train.py: --compress=sign needs two or more replicas" in capsys.readouterr().out
    assert bench.main([*argv, "--only=fp32,fp8+every_2,fp64+segments_2,bf16_sr"]) == 0
    printed = capsys.readouterr().out
    found = table(printed)
    assert [*found] == ["fp32", "fp8+every_2 (emulated)", "fp64+segments_2", "bf16_sr"]
    assert f"torch {torch.__version__}" in printed
    losses = [float(cells[-1]) for cells in found.values()]
    assert losses == pytest.approx([losses[2]] * 4, rel=0.02)
    assert losses[0] == pytest.approx(losses[2], abs=1e-3)
    for ratio, speed, ms, mfu, peak, micro, _ in found.values():
        speed = float(speed.replace(",", ""))
        assert micro == "4" and float(peak.replace(",", "")) > 50
        assert speed * float(ms) / 1000 == pytest.approx(4 * 64, rel=0.01)
        flops = 6 * (2 * 12 * 64**2 + 256 * 64) + 12 * 2 * 64 * 64
        assert float(mfu[:-1]) / 100 == pytest.approx(speed * flops / 1e10, rel=0.05)
