"""What is said when something is mistyped, missing or slow: the sentence names what to do."""

import math
import os
import re
import subprocess
import sys

import pytest
import tiktoken
import torch
from test_train import ROOT, go
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import bench
import sample
import sweep
from benchmarks import scaling
from checkpoint import load as checkpoint
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from monitor import SpikeMonitor
from parallel import launch
from precision import fp8
from run import summary
from settings import fields, parse, synonyms


def refused(*words: str, read=parse.parse) -> str:
    with pytest.raises(ValueError) as error:
        read([*words])
    said = str(error.value)
    assert "\n" not in said and len(said) < 700, said
    return said


# ---- names of other trainers ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "typed, ours",
    [
        ("--learning_rate=6e-4", "lr"),
        ("--max_iters=100", "steps"),
        ("--lr_decay_iters 100", "steps"),
        ("--n_layers=4", "n_layer"),
        ("--zero=1", "data_parallel=zero1"),
        ("--zero 2", "data_parallel=zero2"),
        ("--zero_optimization.stage=3", "data_parallel=zero3"),
        ("--zero_stage=0", "data_parallel=ddp"),
        ("--fsdp", "data_parallel=fsdp"),
        ("--fsdp=true", "data_parallel=fsdp"),
        ("--ddp", "data_parallel=ddp"),
        ("--amp", "precision"),
        ("--fp16", "precision=fp16"),
        ("--bf16.enabled true", "precision=bf16"),
        ("--tensor-model-parallel-size 2", "tp"),
        ("--use-distributed-optimizer", "data_parallel=zero1"),
        ("--recompute-activations", "activation_checkpoint=full"),
        ("--training.local_batch_size=8", "micro_batch_size"),
        ("--checkpoint.interval=500", "save_every"),
        ("--metrics.log_freq=10", "log_every"),
        ("--activation_checkpoint.mode=full", "activation_checkpoint=full"),
        ("--pipeline_parallel_schedule=1F1B", "pp_schedule"),
        ("--offload_optimizer.device=cpu", "offload=cpu"),
        ("--offload_param.device=cpu", "offload_params=cpu"),
        ("--communication_data_type=bf16", "reduce_dtype"),
        ("--fp16.initial_scale_power=16", "scaler.init_power"),
        ("--moe_args.num_experts=8", "n_expert"),
        ("--moe-router-topk=2", "n_expert_active"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(typed, ours):
    assert refused(*typed.split()).endswith(f"; did you mean --{ours}?")


@pytest.mark.parametrize(
    "typed, why",
    [
        ("--dp=8", "it follows: the ranks / (tp x cp x pp); leave it out"),
        ("--router_aux_loss_coef=0.01", "--moe_sequence_loss= keep loads even; leave it out"),
        ("--local-rank=0", "torchrun tells each process; leave it out"),
        ("--zero_optimization.overlap_comm=true", "it is always so here; leave it out"),
        ("--gradient_accumulation_steps=8", "is our batch_size); leave it out"),
        ("--grad_acc_steps=4", "is our batch_size); leave it out"),
        ("--eval_only=true", "every --eval_every= steps; leave it out"),
        ("--sub_group_size=9", "docs/coming_from.md what other trainers call them"),
    ],
)
def test_what_needs_no_flag_here_says_so(typed, why):
    assert refused(typed).endswith(why)


def test_no_name_means_two_things():
    names = [*synonyms.HERE, *synonyms.ABSENT, *synonyms.RECIPE_FLAGS]
    assert len(names) == len(set(names)) and not {*synonyms.ABSENT} & fields.FIELDS.keys()


def test_every_layout_that_a_stage_leads_to_is_one():
    for layout in synonyms.STAGES.values():
        name, _, text = layout.partition("=")
        assert parse.from_text(name, text) == text


@pytest.mark.parametrize(
    "typed, ours",
    [
        ("config/train_gpt2.py", "type configs/gpt2_124m.toml"),
        ("nanoGPT/config/train_shakespeare_char.py", "configs/nanogpt_cpu.toml"),
        ("config/finetune_shakespeare.py", "--init_from=RUN"),
        ("config/mine.py", "is no TOML.*docs/coming_from.md"),
        ("ds_config.json", "is no TOML"),
        ("config/gpt2_124m.toml", r"did you mean configs/gpt2_124m.toml\?"),
        ("nanogpt_cpu", r"did you mean configs/nanogpt_cpu.toml\?"),
        ("nothing_like_it", "flags look like --steps=100"),
        ("--config=my.toml", "without --: python train.py my.toml"),
        ("--job.config_file my.toml", "without --: python train.py"),
    ],
)
def test_recipes_of_other_trainers_lead_to_ours(typed, ours):
    assert re.search(ours, refused(*typed.split()))


def test_the_recipes_that_a_hint_names_are_there_and_are_read():
    for words in synonyms.RECIPES.values():
        parse.parse([str(ROOT / w) if w.endswith(".toml") else w for w in words.split()])


# ---- a blank in the place of the equals sign -----------------------------------------------------
def test_a_blank_or_an_equals_sign_in_every_program(tmp_path, monkeypatch, capsys):
    for words in ("--steps 5", "--steps=5", "--steps = 5", "--steps =5", "--steps= 5"):
        assert parse.parse(words.split()).steps == 5

        # sweep.py: its own options, those to be searched, and those of train.py
        typed = words.replace("steps", "jobs") + f" {words} " + words.replace("steps", "search.lr")
        options, search, rest = sweep.read(typed.split())
        assert options["jobs"] == 5 and search["lr"] == ["5"] and rest == ["--steps=5"]

        # bench.py: --quick has no value, so the next word is none
        monkeypatch.setattr(scaling, "main", lambda argv: print(*argv))
        assert bench.main(["scaling", "--quick", "x.toml", "--quick", "x", *words.split()]) is None
        assert capsys.readouterr().out == "--quick x.toml --quick x --steps=5\n"
    go(ROOT / "model.py", tmp_path, "--steps=1", "--save_every=1", "--eval_every=0")
    said = []
    for words in ("--tokens 5 --seed 3", "--tokens=5 --seed=3", "--tokens=9 --seed=3"):
        capsys.readouterr()
        sample.main([*words.split(), str(tmp_path)])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "words, read, says",
    [
        ("--steps", parse.parse, "--steps has no value; type --steps="),
        ("--steps --lr=1", parse.parse, "--steps has no value; type --steps="),
        ("--sp --lr=1", parse.parse, "--sp has no value; type --sp=true"),
        ("--jobs --search.lr=1,2", sweep.read, "--jobs has no value; type --jobs=1"),
        ("--search.lr=1,2 --steps", sweep.read, "--steps has no value; type --steps="),
        ("--search.lr --steps=3", sweep.read, "--search.lr"),
        ("out --tokens", sample.main, "--tokens has no value; type --tokens="),
        ("out --tokens=many", sample.main, "--tokens: invalid int value: 'many'; .* --help"),
        ("out --tokenz=3", sample.main, "--tokenz=3; python sample.py --help"),
        ("--tokens=3", sample.main, "required: run; python sample.py --help"),
    ],
)
def test_a_missing_value_is_a_sentence(words, read, says):
    assert re.search(says, refused(*words.split(), read=read))


def test_a_bench_says_that_a_value_is_missing(capsys):
    assert bench.main(["speedrun", "--runs"]) == bench.main(["speedrun", "--runs", "--quick"]) == 2
    assert capsys.readouterr().err.count("--runs is not understood; usage: ") == 2


# ---- what is missing -----------------------------------------------------------------------------
def test_missing_data_are_named_before_the_run_that_is_there(tmp_path):
    out = tmp_path / "out"
    go(ROOT / "model.py", out, "--steps=1", "--save_every=1", "--eval_every=0")
    for name in ("gone.txt", "gone", "gone/*.txt", "a.txt,gone.txt"):
        (tmp_path / "a.txt").write_text("a" * 99)
        data = ",".join(str(tmp_path / part) for part in name.split(","))
        with pytest.raises(ValueError) as error:
            go(data, out, "--steps=2", "--n_layer=1")
        assert "gone" in str(error.value) and "holds a run" not in str(error.value)
        assert re.search("does not exist|matches no file|is no file", str(error.value))


def test_a_checkpoint_that_keep_has_deleted_is_not_called_damaged(tmp_path):
    go(ROOT / "model.py", tmp_path / "out", "--steps=4", "--save_every=1", "--keep=2")
    gone = tmp_path / "out" / "step-00000001"
    assert not gone.exists()
    for read in (sample.load, checkpoint.resolve):
        with pytest.raises(ValueError) as error:
            read(str(gone))
        assert "was deleted, for the run keeps its newest 2 (--keep=2)" in str(error.value)
        assert "cut short" not in str(error.value)


def test_a_table_that_cannot_be_fetched_gives_the_advice_first(monkeypatch):
    long = (
        "HTTPSConnectionPool(host='openaipublic.blob.core.windows.net', port=443): Max retries "
        "exceeded with url: /gpt-2/encodings/main/vocab.bpe (Caused by NewConnectionError('no')"
    )

    def offline(name):
        raise OSError(long)

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError) as error:
        Tokenizer("gpt2")
    said = str(error.value)
    assert said.startswith("tiktoken cannot fetch its encoding gpt2: set TIKTOKEN_CACHE_DIR to")
    assert re.search(r"or use --tokenizer=bytes \(HTTPSConnectionPool.* \.\.\.\)$", said)
    assert len(said) < 300


@pytest.mark.parametrize("tp, n_head, fits", [(3, 4, 2), (5, 12, 4), (7, 6, 6), (8, 12, 6)])
def test_the_largest_tp_that_fits_is_named(tp, n_head, fits):
    said = refused(f"--tp={tp}", f"--n_head={n_head}", f"--n_embd={32 * n_head}")
    assert said.endswith(f"--tp={fits} would")
    parse.parse([f"--tp={fits}", f"--n_head={n_head}", f"--n_embd={32 * n_head}"])


# ---- what a run says -----------------------------------------------------------------------------
def test_fp8_without_hardware_says_so_and_no_more():
    cpu = torch.device("cpu")

    def said(device="cpu", **options) -> str:
        model = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32))
        why = fp8.convert(model, cpu, **options).why_emulated
        cfg = fields.Config(precision="fp8", device=device, compile="off")
        return summary.about_precision(cfg, "a chip", why, is_alone=True)

    for scale in ("tensor", "row", "block"):
        assert said(scaling=scale) == (
            "fp8 on a chip. No FP8 hardware here: emulating it (same numbers, slower)."
        )
    # Whoever asked for emulation, and whoever has a GPU that is too old, hears why.
    assert said(hardware="never").endswith("but slower (--fp8.hardware=never)")
    assert "FP8 products scaled by block need a Hopper GPU" in said(device="cuda:0")


class Nothing:
    next = 0


def vanished(losses: list[float], norm: float) -> str:
    """What the monitor says after steps with these losses, when the norm is this one."""
    spikes = SpikeMonitor(None, None, Nothing(), on_spike=None)
    for step, loss in enumerate(losses[:-1]):
        spikes.check(step, loss, 1.0, range(8))
    spikes.check(len(losses) - 1, losses[-1], norm, range(8))
    (event,) = spikes.events
    assert (event["event"], event["value"]) == ("vanishing", norm)
    return event["text"]


def test_a_small_gradient_says_how_the_loss_is():
    assert vanished([5.58, 5.7, 5.93], 0.00941) == (
        "gradient norm 0.0094 is very small: stuck (loss 5.93, at the start 5.58): try a lower --lr"
    )
    assert vanished([5.58, 3.0, 0.012], 0.001) == (
        "gradient norm 0.001 is very small: converged, or stuck (loss 0.012, at the start 5.58); "
        "if stuck, try a lower --lr"
    )
    # Of a long run the monitor remembers the newest losses alone.
    assert "(loss 1, earlier 4)" in vanished([5 - 0.001 * i for i in range(1500)] + [1.0], 0.001)
    assert "is very small: all is learnt" in vanished([math.e], 0.001)


# ---- under torchrun ------------------------------------------------------------------------------
def test_torchruns_last_line_is_our_sentence(tmp_path, monkeypatch):
    sentence = "train.py: tp=3 does not divide n_head=4, and a head is not split; --tp=2 would"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    launch.tell_torchrun(sentence)
    guilty = ProcessFailure(1, 4711, 2, str(tmp_path / "error.json"))
    # Another rank ended because of it, in the same second: torchrun must not take that for first.
    victim = ProcessFailure(0, 4712, 1, "no file")
    lines = str(ChildFailedError("train.py", {0: victim, 1: guilty})).strip().splitlines()
    assert lines[-2] == f"  traceback : {sentence}" and set(lines[-1]) == {"="}
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
    launch.tell_torchrun(sentence)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    launch.tell_torchrun(sentence)


@pytest.mark.slow
def test_a_failure_under_torchrun_ends_with_our_sentence(tmp_path):
    words = f"torch.distributed.run --standalone --nproc_per_node=2 train.py --out_dir={tmp_path}"
    done = subprocess.run(
        [sys.executable, "-m", *words.split(), "--tp=3"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    last = done.stderr.strip().splitlines()[-2]
    assert done.returncode == 1 and re.search("traceback : train.py: tp=3 .*; --tp=2 would$", last)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train.py", "sweep.py"])
def test_help_into_a_pipe_that_nobody_reads_ends_well(program):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, program, "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
        )
    finally:
        os.close(writer)
    assert done.returncode == 0 and done.stderr == b""
