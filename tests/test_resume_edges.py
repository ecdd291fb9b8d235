"""Edges of going on: a run's own config.toml, renamed and moved things, others' checkpoints,
wrong values."""

import contextlib
import gc
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from test_train import rows

import train
from checkpoint import load, save
from checkpoint.load import resolve
from run import announce, resume
from settings import fields, parse

ROOT = Path(train.__file__).parent
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--batch_size=4",
    "--steps=2",
    "--eval_every=0",
    "--sample_tokens=0",
    "--precision=fp32",
    "--device=cpu",
    "--plot=false",
]


def start(*argv) -> dict:
    return train.main(parse.parse([*map(str, argv)]))


def saved(run) -> dict:
    """The settings in its newest checkpoint, but for the folder that it is in."""
    tree = load.newest(run).tree("config")
    return {name: value for name, value in tree.items() if name not in ("out_dir", "cwd", "resume")}


def refused(*argv) -> str:
    try:
        start(*argv)
    except ValueError as error:
        said = str(error)
    gc.collect()  # a traceback keeps the folder's lock
    assert "\n" not in said
    return said


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A folder with texts whose names a shell would take apart."""
    folder = tmp_path_factory.mktemp("it's (a) $HOME")
    text = (ROOT / "model.py").read_bytes()
    (folder / "my text.txt").write_bytes(text)
    (folder / "other [1].txt").write_bytes(text[:-3000])
    return folder


@pytest.fixture(scope="module")
def parent(prose, tmp_path_factory):
    """A run of 4 steps with checkpoints of the steps 3 and 4."""
    out = tmp_path_factory.mktemp("runs") / "a"
    start(*TINY, f"--data={prose}/my text.txt", f"--out_dir={out}", "--steps=4", "--save_every=1")
    return out


# ---- a run's own config.toml is a recipe ---------------------------------------------------------
KINDS = """--optim=adamw --opt.betas=0.9,0.95 --tied=true | --optim=schedule_free --arch=gpt2 |
--arch=track3 --precision=bf16_sr |
--norm=layernorm --bias=true --scalar_lr=0.02 --mup_base_width=16 |
--precision=bf16 --schedule=cosine --min_lr_frac=0.1 --warmup_steps=1 --window=7 |
--ngram_embed=3 --head_lr=0.1 --activation_checkpoint=every_2 --precision=fp64 |
--n_kv_head=1 --micro_batch_size=2 --activation_checkpoint=none --logit_cap=none
--eval_every=none"""
SLOW = """--seed=3 | --optim=sgd --opt.momentum=0.9 |
--arch=gpt2 --optim=adamw --bias=false --weight_decay=0.1 |
--qk_clip=100 --qk_norm=false --schedule=wsd --schedule.shape=cosine --ngram=2 | --optim=lion |
--optim=lamb | --optim=lars | --optim=soap | --optim=shampoo | --optim=adam_l2 |
--optim=adafactor --opt.beta1=0.9 | --optim=schedule_free.SGDScheduleFree |
--head_lr=0.1 --embed_lr=0.2 | --optim=adafactor --opt.eps=none,1e-3 |
--optim=muon --opt.ns=polar --opt.normuon_beta2=none | --precision=fp16 --scaler.init_power=4 |
--precision=fp8 --fp8.scaling=tensor | --dropout=0.1 | --schedule=constant |
--schedule=inverse_sqrt --schedule.timescale=5 | --schedule=onecycle |
--schedule=sgdr --schedule.T_0=2 | --activation_checkpoint=full | --vocab_size=300 |
--compile=off | --lr_scaling=sqrt --base_batch_size=2 | --batch_ramp=4 --batch_ramp_from=2 |
--z_loss=1e-4 | --attention_scale=none --attention=plain | --grad_clip=none --clip_value=1 |
--offload=disk | --on_spike=rollback --monitor.ring=1 | --momentum_warmup=3 | --position=learned |
--save_every=0 | --patience=3 --eval_every=1 --eval_tokens=64 | --keep=none --save_hours=1 |
--watch_every=1"""


def kinds(text):
    return [" ".join(kind.split()) for kind in text.split("|")]


@pytest.mark.parametrize(
    "flags", kinds(KINDS) + [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds(SLOW)]
)
def test_a_run_s_own_config_toml_starts_the_same_run(tmp_path, prose, flags):
    first, again = tmp_path / "a", tmp_path / "b"
    start(*TINY, f"--data={prose}/my text.txt", f"--out_dir={first}", *flags.split())
    start(first / "config.toml", f"--out_dir={again}")
    assert saved(again) == saved(first)
    losses = [[row["loss"] for row in rows(out).values()] for out in (first, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    # and what its command gave is what counts as given, so that it is held against nobody else
    commands = parse.parse([*TINY, *flags.split()]), parse.parse([str(first / "config.toml")])
    assert not {*fields.chosen(commands[0])} - {*fields.chosen(commands[1])}
    start(first / "config.toml")  # it is over; nothing contradicts the run itself


def on_ranks(rank, world, *argv):
    start(*argv)
    return [
        row["loss"]
        for row in rows(next(a for a in argv if "out_dir" in a).partition("=")[2]).values()
    ]


@pytest.mark.slow
def test_a_config_toml_starts_on_other_ranks_and_in_other_layouts(tmp_path, prose):
    data = f"--data={prose}/my text.txt"
    start(*TINY, data, f"--out_dir={tmp_path}/one", "--precision=fp64")
    one = [row["loss"] for row in rows(tmp_path / "one").values()]
    for more in ([], ["--data_parallel=fsdp"], ["--tp=2"]):
        argv = [
            f"{tmp_path}/one/config.toml",
            f"--out_dir={tmp_path}/two{len(more)}{more[:1]}",
            *more,
        ]
        assert run_ranks(2, on_ranks, *argv)[0] == pytest.approx(one, rel=1e-9)
    run_ranks(2, on_ranks, *TINY, data, f"--out_dir={tmp_path}/both", "--precision=fp64")
    start(tmp_path / "both" / "config.toml", f"--out_dir={tmp_path}/alone")
    assert [row["loss"] for row in rows(tmp_path / "alone").values()] == pytest.approx(
        one, rel=1e-9
    )


def test_a_later_word_that_makes_it_another_run_chooses_anew(tmp_path, prose):
    start(*TINY, f"--data={prose}/my text.txt", f"--out_dir={tmp_path}/a", "--lr=0.03", "--steps=1")
    own = f"{tmp_path}/a/config.toml"
    same, other = parse.parse([own, "--steps=9"]), parse.parse([own, "--arch=gpt2"])
    assert (same.lr, same.embed_lr, same.norm, same.zero_init) == (0.03, 0.01, "rmsnorm", True)
    assert {"lr", "steps"} <= same.given and not {
        "embed_lr",
        "norm",
        "micro_batch_size",
    } & same.given
    assert (other.lr, other.embed_lr, other.norm, other.tied) == (0.03, None, "auto", "auto")
    assert parse.parse([own, "--embed_lr=0.5"]).embed_lr == 0.5
    assert parse.parse([own, "--optim=adamw"]).embed_lr is None
    assert "embed_lr = 0.01" in Path(own).read_text()
    with pytest.raises(ValueError, match="did you mean --steps"):
        parse.parse([own, "--chosen.steps=3"])


def test_what_the_chosen_schedule_has_no_use_for_is_said(tmp_path, prose, capsys):
    flags = [*TINY, f"--data={prose}/my text.txt", f"--out_dir={tmp_path}/a"]
    flags += ["--optim=schedule_free", "--min_lr_frac=0.1", "--decay_frac=0.3"]
    start(*flags)
    said = capsys.readouterr().out
    assert "min_lr_frac=0.1: schedule=constant never decays" in said and "decay_frac=0.3: " in said
    start(*flags, "--steps=3")
    start(tmp_path / "a" / "config.toml", "--steps=4")
    assert sorted(rows(tmp_path / "a")) == [1, 2, 3, 4]
    assert "has no meaning" in refused(*flags, "--schedule=constant")


def test_what_an_earlier_command_gave_stays_given(tmp_path, prose):
    """A run that goes on under a shorter command; a branch of it."""
    flags = [*TINY, f"--data={prose}/my text.txt"]
    start(*flags, f"--out_dir={tmp_path}/a", "--embed_lr=0.3", "--tied=true")
    start(*flags, f"--out_dir={tmp_path}/a", "--steps=3")
    start(f"--resume={tmp_path}/a", f"--out_dir={tmp_path}/b", "--steps=4")
    for run in "ab":
        again = parse.parse([f"{tmp_path}/{run}/config.toml", "--seed=5"])
        assert (again.embed_lr, again.tied, again.lr) == (0.3, True, None), run
        assert again.n_embd == 32 and {"embed_lr", "tied", "n_embd"} <= again.given


@pytest.mark.parametrize("key", ["chosen", "cwd"])
def test_a_checkpoint_that_says_less_of_its_settings_is_resumed(tmp_path, parent, key):
    out = Path(shutil.copytree(parent, tmp_path / "a"))
    path = out / "step-00000004" / "index.json"
    body = json.loads(path.read_bytes())["body"]
    del body["tree"]["config"][key]
    path.write_bytes(save.as_json({"body": body, "sha256": save.sha256(save.as_json(body))}))
    data = load.load(path.parent).tree("config/data")
    start(*TINY, f"--data={data}", f"--out_dir={out}", "--steps=5", "--save_every=1")
    assert sorted(rows(out)) == [1, 2, 3, 4, 5]


# ---- checkpoints by other names, and those that are none -----------------------------------------
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_checkpoint_may_be_renamed_or_linked(tmp_path, parent, ranks):
    shutil.copytree(parent / "step-00000004", tmp_path / "my best")
    (tmp_path / "latest").symlink_to(parent / "step-00000004")
    (tmp_path / "run").symlink_to(parent)
    for i, name in enumerate(["my best", "latest", "run/step-00000003", "run"][: 5 - ranks]):
        argv = [f"--resume={tmp_path}/{name}", f"--out_dir={tmp_path}/{i}", "--steps=5"]
        [start(*argv)] if ranks == 1 else run_ranks(2, on_ranks, *argv)
        assert max(rows(tmp_path / str(i))) == 5


def test_a_deleted_checkpoint_is_not_called_cut_short(tmp_path, parent):
    argv = [f"--out_dir={tmp_path}/x", "--steps=9"]
    said = {step: refused(f"--resume={parent}/step-{step:08d}", *argv) for step in (1, 9)}
    assert "was deleted" in said[1] and "--keep=2" in said[1] and "deleted" not in said[9]
    for text in said.values():
        assert (
            f"{parent / 'step-00000003'}, {parent / 'step-00000004'}" in text
            and "cut short" not in text
        )
    with pytest.raises(ValueError, match="not there"):
        load.load(parent / "step-00000001")


FOREIGN = {
    "model.safetensors": "safetensors",
    "ckpt.pt": "nanoGPT",
    "pytorch_model.bin": "torch.save",
    "m.gguf": "GGUF",
    "hf/model.safetensors": "Hugging Face",
    "hf2/pytorch_model.bin": "Hugging Face",
    "hf3/model.safetensors.index.json": "Hugging Face",
    "lora/adapter_config.json": "Hugging Face",
    "out/ckpt.pt": "nanoGPT",
    "dcp/.metadata": "torch.distributed.checkpoint",
    "ds/zero_to_fp32.py": "DeepSpeed",
    "some/weights.pth": "torch.save",
}


# What --init_from= reads, and finds damaged.
READ = {
    "model.safetensors": "cannot be read",
    "ckpt.pt": "such as nanoGPT saves",
    "hf/model.safetensors": "has model_type=None",
    "hf3/model.safetensors.index.json": "has model_type=None",
    "out/ckpt.pt": "such as nanoGPT saves",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("flag", ["init_from", pytest.param("resume", marks=pytest.mark.slow)])
def test_others_checkpoints_are_named_and_not_called_damaged(tmp_path, prose, name, flag):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"1234567890")
    (tmp_path / name).with_name("config.json").write_text("{}")
    path = (tmp_path / name).parent if "/" in name else tmp_path / name
    argv = [*TINY, f"--data={prose}/my text.txt", f"--out_dir={tmp_path}/run", f"--{flag}={path}"]
    said = refused(*argv)
    if flag == "init_from" and name in READ:
        assert READ[name] in said
    else:
        assert FOREIGN[name] in said and "--resume= does not read" in said
    assert "intact" not in said


def test_a_part_of_a_checkpoint_leads_to_the_whole(tmp_path, parent):
    for name in ("index.json", "rank_0.safetensors"):
        said = refused(f"--resume={parent}/step-00000004/{name}", f"--out_dir={tmp_path}/x")
        assert f"part of the checkpoint {parent}/step-00000004;" in said
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match="does not exist, so it is not a folder"):
        resolve(tmp_path / "gpt2")


# ---- the same thing in another place -------------------------------------------------------------
def moved_flags(run, data, steps=5):
    return [*TINY, "--save_every=1", f"--data={data}", f"--out_dir={run}", f"--steps={steps}"]


def test_the_same_data_under_another_path_are_the_same(tmp_path, monkeypatch, prose):
    monkeypatch.chdir(tmp_path)
    text = (prose / "my text.txt").read_bytes()
    Path("t.txt").write_bytes(text)
    start(*moved_flags("a", "t.txt", 2))
    start(*moved_flags("a", tmp_path / "t.txt", 3))
    Path("m").mkdir()
    shutil.move("t.txt", "m/new name.txt")
    start(*moved_flags("a", "m/new name.txt", 4))
    assert sorted(rows("a")) == [1, 2, 3, 4]
    Path("m/other.txt").write_bytes(text[:-500])
    assert "m/other.txt" in refused(*moved_flags("a", "m/other.txt"))
    assert "holds a run with data='m/new name.txt'" in refused(*moved_flags("a", "python"))


def test_a_command_goes_on_from_another_folder(tmp_path, monkeypatch, prose):
    """Relative paths mean what they meant where the run began, unless there is such a file here."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    Path("t.txt").write_bytes((prose / "my text.txt").read_bytes())
    start(*moved_flags("a", "t.txt", 2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    start(*moved_flags(home / "a", "t.txt", 3))
    start(f"--resume={home}/a", "--out_dir=b", "--steps=4")  # what it leaves open, too
    Path("t.txt").write_bytes(b"something else " * 500)
    assert "t.txt" in refused(*moved_flags(home / "a", "t.txt", 4))


@pytest.mark.slow
def test_a_branch_knows_its_parent_by_any_path(tmp_path, monkeypatch, parent):
    monkeypatch.chdir(parent.parent)
    (tmp_path / "link").symlink_to(parent)
    for step, path in (
        (5, "a"),
        (6, parent),
        (7, tmp_path / "link"),
        (8, "../" + parent.parent.name + "/a"),
    ):
        start(f"--resume={path}", f"--out_dir={tmp_path}/branch", f"--steps={step}")
    monkeypatch.chdir(tmp_path)
    start(f"--resume={parent}", f"--out_dir={tmp_path}/branch", "--steps=9")
    assert sorted(rows(tmp_path / "branch")) == [5, 6, 7, 8, 9]


def test_a_branch_whose_parent_is_gone_goes_on(tmp_path, parent):
    shutil.copytree(parent, tmp_path / "gone")
    command = [f"--resume={tmp_path}/gone", f"--out_dir={tmp_path}/branch"]
    start(*command, "--steps=5")
    shutil.rmtree(tmp_path / "gone")
    start(*command, "--steps=6")
    assert sorted(rows(tmp_path / "branch")) == [5, 6]


def test_another_parent_is_refused_with_what_goes_on(tmp_path, parent):
    own = shutil.copytree(parent, tmp_path / "it's mine")
    start(f"--resume={own}", f"--out_dir={tmp_path}/branch", "--steps=5")
    said = refused(f"--resume={parent}", f"--out_dir={tmp_path}/branch", "--steps=6")
    assert "holds another run (a branch: " in said
    start(*advice(said), f"--out_dir={tmp_path}/branch", "--steps=6")
    for path in (own, own / "step-00000004"):
        said = refused(f"--resume={path}", f"--out_dir={own}", "--steps=6")
        assert "--resume=auto resumes" in said and "another run" not in said


# ---- what is wrong comes first, and what is said can be pasted -----------------------------------
def advice(sentence: str) -> list[str]:
    """The flags that a sentence tells to type, as a shell would read them."""
    word = r"--[\w.]+=(?:'[^']*'|\"[^\"]*\"|[^\s'\";,)])+"
    return shlex.split(re.search(word, sentence)[0])


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--data=nowhere.txt", "--data=nowhere.txt does not exist"),
        ("--data=shakespear", "mean shakespeare"),
        pytest.param("--tokenizer=gpt22", "gpt22", marks=pytest.mark.slow),
        pytest.param("--optim=adamv", "no such file in optim/", marks=pytest.mark.slow),
        pytest.param("--init_from=nowhere", "nowhere does not exist", marks=pytest.mark.slow),
        ("--resume=nowhere", "nowhere does not exist"),
    ],
)
def test_a_wrong_value_is_said_before_what_the_folder_holds(prose, parent, flag, says):
    said = refused(*TINY, f"--data={prose}/my text.txt", f"--out_dir={parent}", "--seed=9", flag)
    assert says in said and "holds" not in said
    assert "--seed=1337" in refused(
        *TINY, f"--data={prose}/my text.txt", f"--out_dir={parent}", "--seed=9"
    )


CLASHES = [  # what the run has, what is typed now
    ("lr", 1e-05, "--lr=3"),
    ("tied", True, "--tied=false"),
    ("n_kv_head", 1, "--n_kv_head=2"),
    ("opt.betas", (0.9, 0.95), "--opt.betas=0.8,0.9"),
    ("opt.eps", 1e-12, "--opt.eps=1"),
    ("position", "learned", "--position=rotary"),
    ("logit_cap", None, "--logit_cap=3"),
    ("attention_scale", None, "--attention_scale=1"),
    ("ngram_embed", None, "--ngram_embed=2"),
    ("data", "it's [my] $HOME (text).txt", "--data=python"),
    ("ngram", 3, "--ngram=2"),
]


@pytest.mark.parametrize("name, had, now", CLASHES, ids=[name for name, _, _ in CLASHES])
def test_what_a_refusal_tells_to_type_goes_on(name, had, now):
    """Into a shell, as it stands."""
    flags = [*TINY, "--optim=adamw"]
    old = parse.to_dict(parse.parse([*flags, f"--{name}={value_text(had)}"]))
    with pytest.raises(ValueError) as error:
        resume.continued(parse.parse([*flags, now]), old, branch=False)
    typed = re.search(r": type (--.*) to resume it, ", str(error.value))[1]
    echo = ["sh", "-c", f"printf '%s\\n' {typed}"]
    words = subprocess.run(echo, capture_output=True, text=True).stdout.splitlines()
    again = resume.continued(parse.parse([*flags, *words]), old, branch=False)
    assert len(words) == 1 and parse.to_dict(again)["options"] == old["options"]
    assert "." in name or getattr(again, name) == had


@pytest.mark.parametrize(
    "more, default, another",
    [
        ([], "--opt.momentum=0.95", "--opt.momentum=0.9"),
        (["--optim=adamw"], "--opt.betas=0.9,0.999", "--opt.betas=0.9,0.95"),
        (
            ["--hooks=radial_brake"],
            "--hook.radial_brake.outward=0.5",
            "--hook.radial_brake.outward=1",
        ),
        (["--diloco_every=2"], "--diloco.momentum=0.9", "--diloco.momentum=0.8"),
        (["--precision=fp8"], "--fp8.scaling=block", "--fp8.scaling=row"),
    ],
    ids=lambda words: words if isinstance(words, str) else "",
)
def test_a_default_that_is_typed_is_what_the_run_has(more, default, another):
    """Before, later, or both times."""
    flags = [*TINY, *more]
    name = default.partition("=")[0]
    for had, now in (
        ([], [default]),
        ([default], []),
        ([default], [default]),
        ([another], [another]),
    ):
        old = parse.to_dict(parse.parse([*flags, *had]))
        new = resume.continued(parse.parse([*flags, *now]), old, branch=False)
        assert len(new.options) == len(now)
    for had, now in (
        ([], [another]),
        ([another], []),
        ([another], [default]),
        ([default], [another]),
    ):
        old = parse.to_dict(parse.parse([*flags, *had]))
        with pytest.raises(ValueError, match=name[2:]):
            resume.continued(parse.parse([*flags, *now]), old, branch=False)


def value_text(value) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if (value is None or isinstance(value, bool))
        else str(value)
    )


def test_paths_in_advice_are_quoted(tmp_path, prose, parent):
    out = tmp_path / "my run's $1"
    shutil.copytree(parent, out)
    said = refused(*TINY, "--data=python", f"--out_dir={out}")
    start(*TINY, *advice(said), f"--out_dir={out}", "--steps=5", "--save_every=1")
    best = tmp_path / "the best"
    save.save(best, 3, {"model": {"w": torch.zeros(2)}, "config": {"resume": "auto"}})
    assert advice(refused(f"--resume={best}", f"--out_dir={tmp_path}/x")) == [f"--init_from={best}"]


# ---- what changes is said ------------------------------------------------------------------------
def test_a_jump_of_the_learning_rate_is_said_in_a_line(tmp_path, prose, capsys):
    flags = [*TINY, f"--data={prose}/my text.txt", "--save_every=3"]
    for i, (before, after, jumps) in enumerate(
        [
            (["--steps=6"], ["--steps=9"], True),
            (["--steps=6"], ["--steps=7"], True),
            (["--steps=6", "--schedule=constant"], ["--steps=9"], False),
            (["--steps=6"], ["--steps=9", "--decay_frac=0.1"], True),
            (["--steps=6", "--schedule=cosine", "--optim=adamw"], ["--steps=12"], True),
        ]
    ):
        out = tmp_path / str(i)
        kept = [flag for flag in before if "steps" not in flag]
        start(*flags, *before, f"--out_dir={out}")
        last = rows(out)[6]["lr"]
        capsys.readouterr()
        start(*flags, *kept, *after, f"--out_dir={out}")
        said = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("lr goes from")
        ]
        assert len(said) == jumps
        if jumps:
            numbers = [float(x) for x in re.findall(r"\d\.\de[-+]\d+", said[0])]
            assert numbers == pytest.approx([last, rows(out)[7]["lr"]], rel=0.06)
            assert after[0][2:] in said[0] and "(6 before)" in said[0]


def test_an_interrupted_run_goes_on_without_a_word_of_its_learning_rate(tmp_path, prose, capsys):
    flags = [
        *TINY,
        f"--data={prose}/my text.txt",
        "--steps=8",
        "--save_every=3",
        f"--out_dir={tmp_path}/a",
    ]
    start(*flags)
    shutil.rmtree(tmp_path / "a" / "step-00000008")
    capsys.readouterr()
    start(*flags)
    out = capsys.readouterr().out
    assert "resume" in out and "lr goes from" not in out


def test_an_emulated_precision_says_so_and_that_it_is_slower(tmp_path, prose, capsys):
    flags = [*TINY, f"--data={prose}/my text.txt"]
    start(*flags, f"--out_dir={tmp_path}/a", "--precision=fp8", "--steps=1")
    said = capsys.readouterr().out
    assert "No FP8 hardware here: emulating it (same numbers, slower).\n" in said
    assert "decay_embeddings" not in said
    start(*flags, f"--out_dir={tmp_path}/b", "--decay_embeddings=true")
    assert "decay_embeddings: weight_decay is 0, so nothing decays" in capsys.readouterr().out


# ---- the record ----------------------------------------------------------------------------------
def test_a_copy_in_another_repository_records_no_commit(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    git("init")
    for folder in (tmp_path / "copy" / "inside", tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.py").write_text("")
    git("add", ".")
    git("commit", "-m", "theirs")
    cpu = torch.device("cpu")
    for place, known in (("copy/inside", False), ("copy", False), ("", True)):
        monkeypatch.setattr(announce, "__file__", str(tmp_path / place / "run/announce.py"))
        assert (announce.environment(cpu, 1, "")["commit"] != "unknown") == known
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of theirs
    monkeypatch.setattr(announce, "__file__", str(tmp_path.parent / "run/announce.py"))
    assert announce.environment(cpu, 1, "")["commit"] == "unknown"


def test_a_finished_run_without_its_metrics_ends_well(tmp_path, prose):
    flags = [*TINY, f"--data={prose}/my text.txt", f"--out_dir={tmp_path}/a"]
    start(*flags)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert start(*flags) == {}


# ---- without asserts -----------------------------------------------------------------------------
CODE = """
from memory import estimate, plan
from parallel.launch import pick_device
from settings import parse
def say(work, *args):
    try:
        print(work(*args))
    except ValueError as error:
        print("refused:", error)
for name in ("meta", "cuda:77", "vulkan", "xpu", "gpu"):
    say(pick_device, name)
for flag in ("--gpus=0", "--gpus=2.5", "--params=-1", "--params=1e400", "--bucket_mb=-1",
             "--batch=-2"):
    say(estimate.parse, [flag])
    say(plan.parse, [flag])
for words in (["--n_head=3"], ["--tp=3"], ["--steps=0"], ["--zero=1"], ["--opt.x=b'1'"]):
    say(parse.parse, words)
"""


@pytest.mark.slow
def test_python_without_asserts_says_the_same():
    done = subprocess.run(
        [sys.executable, "-O", "-c", CODE], capture_output=True, text=True, cwd=ROOT
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(CODE, {})
    assert done.returncode == 0 and done.stdout == said.getvalue(), done.stderr
    assert said.getvalue().count("refused:") == said.getvalue().count("\n") == 22


@pytest.mark.parametrize(
    "flags, open_fields",
    [("--steps=9", {"attention"}), ("--cp=2", {"attention", "compile"})]
    + [("--pp=2 --pp_schedule=zerobubble", {"attention", "compile"})],
)
def test_a_kernel_that_was_chosen_gives_way_to_another_layout(parent, flags, open_fields):
    saved = load.resolve(parent).tree("config")
    assert saved["attention"] == "plain"  # which a ring has no use for
    saved["compile"] = "default"  # as a longer run chooses; it is no kernel for zerobubble
    data = fields.flag("data", saved["data"])
    cfg = parse.parse([*TINY, *shlex.split(data), *flags.split(), f"--out_dir={parent}"])
    new = resume.continued(cfg, saved, branch=False)
    assert {
        name for name in ("attention", "compile") if getattr(new, name) == "auto"
    } == open_fields
    # One that was typed stays, and says what it is incompatible with.
    saved["chosen"] = [name for name in saved["chosen"] if name not in ("attention", "compile")]
    if flags == "--steps=9":
        assert resume.continued(cfg, saved, branch=False).attention == "plain"
        return
    with pytest.raises(ValueError, match="incompatible with|takes apart"):
        resume.continued(cfg, saved, branch=False)
