import dataclasses
import os
import re
import shlex

import pytest

from run import batch, resume
from settings import checks, fields, synonyms
from settings import parse as config
from settings.fields import Config
from settings.parse import parse


def bad(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        parse(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def recipe(tmp_path, text: str) -> str:
    (tmp_path / "recipe.toml").write_text(text)
    return str(tmp_path / "recipe.toml")


def test_later_wins(tmp_path):
    path = recipe(tmp_path, "steps = 5\nlr = 1\nbatch_size = 4")
    cfg = parse(
        [path, "--steps=7", "--batch_size=1e3", "--tied=TRUE", "--grad_clip=none", "--steps=8"]
    )
    assert (cfg.steps, cfg.lr, cfg.batch_size, cfg.tied, cfg.grad_clip) == (
        8,
        1.0,
        1000,
        True,
        None,
    )
    assert {
        "steps",
        "lr",
        "batch_size",
        "tied",
        "grad_clip",
    } <= cfg.given and "seed" not in cfg.given


def test_a_table_and_a_dotted_key_mean_the_same(tmp_path):
    table = parse([recipe(tmp_path, "[opt]\nbetas = [0.9, 0.95]\neps = 'none'")])
    dotted = parse([recipe(tmp_path, '"opt.betas" = [0.9, 0.95]\n"opt.eps" = "none"')])
    flags = parse(["--opt.betas=0.9,0.95", "--opt.eps=none"])
    assert (
        table.sub("opt")
        == dotted.sub("opt")
        == flags.sub("opt")
        == {
            "betas": (0.9, 0.95),
            "eps": None,
        }
    )


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--stepz=3", "did you mean --steps?"),
        ("--learning_rate=3", "did you mean --lr?"),
        ("--ep=2", "ep means nothing without experts"),
        ("--steps", "--steps has no value; type --steps=VALUE"),
        ("--sp", "--sp has no value; type --sp=true"),
        ("--steps=ten", "a whole number"),
        ("--steps=1.5", "a whole number"),
        ("--steps=true", "a whole number"),
        ("--steps=0", "at least 1"),
        ("--steps=inf", "a whole number"),
        ("--steps=none", "a whole number"),
        ("--lr=-1", "at least 0"),
        ("--lr=nan", "at least 0"),
        ("--dropout=1", "below 1"),
        ("--tied=maybe", "true or false, auto"),
        ("--arch=bert", "modern, gpt2, track3, llama, qwen3"),
        ("--n_head=3", "for instance --n_head=2"),
        ("--n_kv_head=3", "not divisible by n_kv_head"),
        ("--grad_clip=0", "--grad_clip=none"),
        ("--decay_frac=2", "a share"),
        ("--optimizer.x=2", "there is no field"),
        ("steps=3", "flags look like --steps"),
        ("--out_dir=", "--out_dir= is empty; type a value (text)"),
        ("--wandb= ", "--wandb= is empty; type a value (text, none), or leave it out"),
        ("--opt.eps=", "--opt.eps= is empty"),
        ("--opt.eps=b'1'", "is no number, word or list of them"),
        ("--opt.eps=((1,2),3)", "is no number, word or list of them"),
        ("--out_dir=\udcff", "is no text in UTF-8"),
        ("--tp=3", "--tp=2 would"),
        ("--tp=7", "--tp=4 would"),
        ("", "cannot read the recipe"),
    ],
)
def test_a_mistake_is_one_clear_line(flag, says):
    assert says in bad(flag)


@pytest.mark.parametrize(
    "text, says",
    [
        ("steps = ", "damaged"),
        ("steps = 'many'", "a whole number"),
        ("steps = true", "a whole number"),
        ("stepz = 3", "did you mean"),
        ("[optim]\nlr = 3", "there is no field"),
        ("\x00", "damaged"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_clear_line(tmp_path, text, says):
    assert says in bad(recipe(tmp_path, text))


# ---- as people type it ---------------------------------------------------------------------------
def test_a_blank_stands_for_the_equals_sign(tmp_path):
    path = recipe(tmp_path, "steps = 5")
    for words in ("--lr 0.1 --steps 7", "--lr= 0.1 --steps =7", "--lr = 0.1 --steps = 7"):
        cfg = parse([path, *words.split()])
        assert (cfg.lr, cfg.steps) == (0.1, 7)
    assert parse(["--opt.betas", "0.9,0.95", "--out_dir", "my run"]).out_dir == "my run"
    assert "--opt.eps has no value" in bad("--opt.eps")
    assert "at least 0" in bad("--lr", "-1")
    for words in (["--wandb", path], ["--sp", "--steps=3"], ["--wandb=", path], ["--data"]):
        assert f"{words[0].rstrip('=')}=" in bad(*words)
    assert "did you mean --data_parallel=zero1?" in bad("--zero", "1")


def test_none_is_none_for_every_optional_field(tmp_path):
    optional = [n for n in fields.FIELDS if type(None) in config.kinds(n)]
    assert {"wandb", "data_url", "init_from", "activation_checkpoint", "lr", "on_spike"} <= {
        *optional
    }
    for word in ("none", "None", "NONE"):
        for name in optional:
            assert getattr(parse([f"--{name}={word}"]), name) is None, name
            assert getattr(parse([recipe(tmp_path, f'{name} = "{word}"')]), name) is None, name
        assert (
            parse([f"--opt.x={word}"]).options
            == parse([recipe(tmp_path, f'opt.x = "{word}"')]).options
        )
    for name in fields.FIELDS.keys() - {*optional}:
        if str not in config.kinds(name):
            assert "is not allowed" in bad(f"--{name}=none")
            assert "is not allowed" in bad(recipe(tmp_path, f'{name} = "none"'))
    assert parse(["--out_dir=none"]).out_dir == "none"  # which is a name like any other


def test_an_empty_value_is_a_sentence_for_every_field(tmp_path):
    for name in [*fields.FIELDS, "opt.betas"]:
        assert f"--{name}= is empty" in bad(f"--{name}=")
        said = bad(recipe(tmp_path, f'{name} = ""')) if name in fields.FIELDS else ""
        assert "is not allowed" in said or name == "opt.betas", name


def test_words_may_be_in_capitals():
    cfg = parse(
        ["--precision=BF16", "--arch=GPT2", "--tied=True", "--norm=AUTO", "--opt.fused=TRUE"]
    )
    assert (cfg.precision, cfg.arch, cfg.tied, cfg.norm) == ("bf16", "gpt2", True, "auto")
    assert cfg.options == {"opt.fused": True}


@pytest.mark.parametrize(
    "text, value",
    [
        ("0.9,0.95", (0.9, 0.95)),
        ("(0.9, 0.95)", (0.9, 0.95)),
        ("[0.9,0.95]", (0.9, 0.95)),
        ("1", 1),
        ("none,1e-3", (None, 0.001)),
        ("1e-30,None", (1e-30, None)),
        ("0.9,", (0.9,)),
        ("true", True),
        ("a,b", "a,b"),
        ("file (1).txt", "file (1).txt"),
        ("'5'", "5"),
        ("[" * 999, "[" * 999),
    ],
)
def test_an_option_is_a_number_a_word_or_a_list(tmp_path, text, value):
    cfg = parse([f"--opt.x={text}"])
    assert cfg.options == {"opt.x": value} and type(cfg.options["opt.x"]) is type(value)
    again = parse([recipe(tmp_path, config.to_toml(cfg, {}))])
    assert again.options == cfg.options


def test_other_trainers_names_lead_to_ours():
    for name, here in synonyms.HERE.items():
        said = bad(f"--{name}=1")
        assert f"there is no field {name!r}; did you mean --{here}?" == said
        field, equals, text = here.partition("=")
        assert field in fields.FIELDS or field.startswith(("opt.", "scaler."))
        assert not equals or config.from_text(field, text) == text
    for name, here in {
        "batch-size": "batch_size",
        "training.seq_len": "block_size",
        "optimizer.lr": "lr",
        "BATCH_SIZE": "batch_size",
        "no_plot": "plot=false",
        "zero1": "data_parallel=zero1",
        "adam.beta1": "opt.betas",
        "n_layer.": "n_layer",
    }.items():
        assert f"did you mean --{here}?" in bad(f"--{name}=3"), name
    assert "--help lists" in bad("--qqqqqqqq=1")


def test_a_home_is_a_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("out_dir", "data", "data_dir", "resume", "init_from"):
        (tmp_path / "own.toml").write_text(f'{name} = "~/x y"')
        for words in ([f"--{name}=~/x y"], ["~/own.toml"]):
            assert getattr(parse(words), name) == str(tmp_path / "x y").replace("/", os.sep)
        assert getattr(parse([f"--{name}=$HOME/x~y"]), name) == "$HOME/x~y"  # that is the shell's
    assert parse(["--data_url=~/x"]).data_url == "~/x"  # no path


@pytest.mark.parametrize("how", ["utf-8-sig", "utf-16", "CRLF", "utf-8-sig CRLF"])
def test_a_recipe_may_come_from_a_windows_editor(tmp_path, how):
    text = '# caf\u00e9\nsteps = 7\n[opt]\nbetas = [0.9, 0.95]\nx = "\u00e9"\n'
    encoding = how.split()[0].replace("CRLF", "utf-8")
    raw = text.replace("\n", "\r\n") if "CRLF" in how else text
    (tmp_path / "own.toml").write_bytes(raw.encode(encoding))
    cfg = parse([str(tmp_path / "own.toml")])
    assert cfg.steps == 7 and cfg.sub("opt") == {"betas": (0.9, 0.95), "x": "\u00e9"}


def test_the_folder_of_a_run_is_no_recipe_but_has_one(tmp_path):
    (tmp_path / "config.toml").write_text("steps = 7")
    assert str(tmp_path / "config.toml") in bad(str(tmp_path))
    assert "it is no file" in bad(str(tmp_path.parent))


# ---- what messages tell to type ------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, value",
    [
        ("data", "my text.txt"),
        ("data", "it's"),
        ("data", 'a "b" $HOME `x` !'),
        ("data", "a;b&c|d(e)[f]*?"),
        ("data", "C:\\new\\t.txt"),
        ("data", "-x"),
        ("data", "caf\u00e9 \u6587"),
        ("data", "#1"),
        ("wandb", None),
        ("tied", True),
        ("lr", 1e-05),
        ("lr", 0.1 + 0.2),
        ("opt.betas", (0.9, 0.95)),
        ("opt.eps", (None, 1e-3)),
        ("opt.x", (0.5,)),
        ("opt.x", ()),
        ("opt.x", None),
        ("opt.x", False),
        ("steps", 10**6),
    ],
)
def test_what_is_to_be_typed_gives_the_value_in_a_shell(name, value):
    words = shlex.split(fields.flag(name, value))
    cfg = parse(words)
    assert len(words) == 1 and (cfg.options[name] if "." in name else getattr(cfg, name)) == value


REFUSED = """--n_head=3 | --n_embd=255 | --n_embd=7 --n_head=2 | --n_head=256 |
--n_head=128 --arch=track3 | --n_kv_head=3 | --n_head=8 --n_kv_head=6 |
--mup_base_width=64 --arch=track3 | --tp=2 --n_kv_head=1 | --logit_cap=none --logit_cap_form=root |
--ngram_rows=5 | --schedule=cosine --decay_frac=0.3 | --tp=3 | --lr_scaling=sqrt |
--base_batch_size=5 | --batch_ramp=5 | --batch_ramp_from=5 | --tp=8 | --sp=true |
--batch_ramp=100 --batch_ramp_from=5 | --fsdp_shard=2 | --bucket_mb=3 --data_parallel=fsdp |
--cp=3 | --compress=topk --data_parallel=zero1 | --offload_params=cpu | --scaler.fixed=2 |
--fp8.scaling=row | --compress=topk --precision=fp16 | --diloco_every=4 --precision=bf16_sr |
--patience=3 --eval_every=0 | --compress=topk --on_spike=rollback | --min_delta=0.1 |
--qk_clip=100 | --grad_clip=0 | --logit_cap=0 | --tp=4 --n_kv_head=2 |
--cp=2 --tp=2 --sp=true --block_size=30 | --cp=2 --window=20 | --tp=6 --n_head=8 |
--cp=2 --attention=plain | --cp=3 --cp_attention=ulysses --block_size=258 | --pp=2 --pp_chunks=2 |
--pp=5 | --cp=2 --cp_attention=ulysses --n_kv_head=1 |
--pp=2 --pp_schedule=interleaved --pp_chunks=1 | --pp=3 --pp_schedule=interleaved |
--pp=2 --n_layer=1 | --n_layer=1 --pp=2 --pp_schedule=interleaved | --data_parallel=zero2 --tp=2 |
--data_parallel=fsdp --pp=2 --pp_schedule=zerobubble |
--pp=2 --pp_schedule=zerobubble --compile=default | --activation_checkpoint=full_sharded |
--n_head=32 --attention=flex | --tp=9 --n_head=1"""


@pytest.mark.parametrize("flags", [" ".join(flags.split()) for flags in REFUSED.split("|")])
def test_what_a_refusal_proposes_is_taken(flags):
    said = bad(*flags.split())
    proposals = re.findall(r"--[a-z_.]+=[^\s;,?)]+(?: --[a-z_.]+=[^\s;,?)]+)*", said)
    assert proposals, said
    for words in proposals:
        parse([*flags.split(), *words.split()])


@pytest.mark.parametrize(
    "flags, dp",
    [
        ("--batch_size=10", 4),
        ("--batch_size=16 --batch_ramp=9 --batch_ramp_from=4", 3),
        ("--batch_size=16 --batch_ramp=9 --batch_ramp_from=2", 4),
        ("--micro_batch_size=5", 2),
        ("--micro_batch_size=3 --batch_size=16", 2),
    ],
)
def test_what_is_proposed_for_a_batch_divides(flags, dp):
    with pytest.raises(ValueError) as error:
        batch.batch_share(parse(flags.split()), dp)
    batch.batch_share(
        parse([*flags.split(), *re.search(r"try (--.*)", str(error.value))[1].split()]), dp
    )


def test_huge_numbers_are_refused_at_once():
    most = 2**31 - 1
    for flags in (
        f"--n_embd={most}",
        f"--n_head={most}",
        f"--tp={most}",
        f"--n_kv_head={most} --n_head={most - 1}",
        f"--batch_ramp=1 --batch_ramp_from={most - 1} --batch_size={most}",
    ):
        bad(*flags.split())


def test_a_recipe_is_never_executed(tmp_path):
    text = '"opt.betas" = "__import__(\'os\').system(\'touch pwned\')"\nout_dir = "$(touch pwned)"'
    cfg = parse([recipe(tmp_path, text), "--opt.eps=__import__('os').getcwd()"])
    assert (
        cfg.options["opt.eps"] == "__import__('os').getcwd()" and not (tmp_path / "pwned").exists()
    )


def test_a_toml_file_written_from_a_config_reads_back_the_same(tmp_path):
    cfg = parse(
        [
            "--opt.betas=0.9,0.95",
            '--out_dir=a "b"\\c\x7f\t\r\u00e9',
            "--grad_clip=none",
            "--lr=1e-3",
            "--tied=true",
        ]
    )
    again = parse([recipe(tmp_path, config.to_toml(cfg, {"commit": "abc"}))])
    assert config.to_dict(again) == config.to_dict(cfg)
    assert config.to_dict(config.from_dict(config.to_dict(cfg))) == config.to_dict(cfg)


def test_options_are_checked_against_the_signature():
    def target(params, lr=0.1, betas=(0.9, 0.99), nesterov=False, dtype=None): ...

    ok = Config(options={"opt.betas": (0.8, 0.9), "opt.dtype": "float32"})
    given = ("params", "lr")
    assert checks.check_options(ok, "opt", target, given) == {
        "betas": (0.8, 0.9),
        "dtype": "float32",
    }
    for name, value, says in [
        ("opt.beta", 1, "did you mean --opt.betas"),
        ("opt.lr", 1, "no such argument"),
        ("opt.betas", 0.9, "the default is 0.9,0.99"),
        ("opt.nesterov", 1, "wrong kind"),
    ]:
        with pytest.raises(ValueError, match=says):
            checks.check_options(Config(options={name: value}), "opt", target, given)


def test_help_names_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in fields.FIELDS)
    assert all(f.metadata["help"] for f in fields.FIELDS.values())


def test_every_field_is_used():
    """A flag that does nothing is a defect: each field's name appears outside settings/fields.py
    and settings/checks.py."""
    from pathlib import Path

    root = Path(__file__).parent.parent
    text = "".join(
        path.read_text() for path in (root / "train.py", root / "model.py", *root.glob("run/*.py"))
    )
    elsewhere = {"arch", "pp_chunks"}  # in settings.fields, with_traits and model_chunks
    assert [
        n
        for n in fields.FIELDS
        if f"cfg.{n}" not in text and f"{n}:" not in text and n not in elsewhere
    ] == []


def test_every_recipe_in_configs_parses():
    from pathlib import Path

    paths = sorted((Path(__file__).parent.parent / "configs").rglob("*.toml"))
    assert len(paths) >= 9
    for path in paths:
        parse([str(path)])


def test_the_default_recipe_is_the_default():
    from pathlib import Path

    path = Path(__file__).parent.parent / "configs" / "cpu.toml"
    assert config.to_dict(parse([str(path)])) | {"schedule": "auto"} == config.to_dict(Config())


def test_what_a_run_chose_is_written_apart_and_is_nobody_s_wish(tmp_path):
    cfg = fields.update(
        parse(["--lr=0.5", "--steps=3"]), embed_lr=0.1, tied=False, attention_scale=None
    )
    cfg = fields.update(cfg, device="cuda:0", precision="bf16")
    assert fields.chosen(cfg) == ["device", "attention_scale", "tied", "embed_lr", "precision"]
    text = config.to_toml(cfg, {})
    assert text.index("lr = 0.5") < text.index("[chosen]") < text.index("embed_lr = 0.1")
    again = parse([recipe(tmp_path, text)])
    assert (again.embed_lr, again.tied, again.precision, again.device) == (
        0.1,
        False,
        "bf16",
        "auto",
    )
    assert fields.chosen(again) == ["attention_scale", "tied", "embed_lr", "precision"]
    old = config.from_dict(config.to_dict(cfg))
    assert old.given == {"lr", "steps"} and config.to_dict(old)["chosen"] == fields.chosen(cfg)
    for word in ("--optim=adamw", "--opt.eps=1", "--device=cpu", "--n_layer=3"):
        assert fields.chosen(parse([recipe(tmp_path, text), word])) == [], word
    for word in ("--steps=9", "--out_dir=x", "--schedule=cosine", "--log_every=2"):
        assert fields.chosen(parse([recipe(tmp_path, text), word])) == fields.chosen(again), word


# ---- continuing ----------------------------------------------------------------------------------
def resolved(**values) -> dict:
    return config.to_dict(
        dataclasses.replace(
            fields.with_traits(Config(precision="bf16", schedule="wsd", lr=0.02)), **values
        )
    )


def test_auto_takes_what_was_chosen_and_may_change_steps_and_schedule():
    cfg = resume.continued(
        parse(["--steps=9", "--schedule=cosine", "--log_every=2"]), resolved(), branch=False
    )
    assert (cfg.steps, cfg.schedule, cfg.log_every, cfg.precision, cfg.lr) == (
        9,
        "cosine",
        2,
        "bf16",
        0.02,
    )


@pytest.mark.parametrize(
    "flag",
    [
        "--lr=0.1",
        "--seed=2",
        "--precision=fp32",
        "--n_layer=5",
        "--opt.beta=1",
        "--data=shakespeare",
    ],
)
def test_auto_refuses_another_run_and_names_the_field(flag):
    with pytest.raises(ValueError, match=flag.split("=")[0][2:] + ".*--resume=never"):
        resume.continued(parse([flag]), resolved(), branch=False)


def test_auto_refuses_a_field_that_is_no_longer_given():
    with pytest.raises(ValueError, match="n_embd=512"):
        resume.continued(parse([]), resolved(n_embd=512), branch=False)


def test_a_branch_keeps_what_is_not_given_and_may_change_lr_and_data():
    saved = resolved(n_embd=512, seed=3, options={"opt.eps": 1e-6, "schedule.shape": "sqrt"})
    cfg = resume.continued(
        parse(["--resume=x", "--lr=0.5", "--data=shakespeare"]), saved, branch=True
    )
    assert (cfg.n_embd, cfg.seed, cfg.lr, cfg.data, cfg.resume) == (512, 3, 0.5, "shakespeare", "x")
    assert cfg.options == saved["options"]
    cfg = resume.continued(parse(["--resume=x", "--schedule=cosine"]), saved, branch=True)
    assert cfg.options == {"opt.eps": 1e-6}


@pytest.mark.parametrize("flag", ["--n_embd=256", "--optim=adamw", "--opt.eps=1e-8", "--tied=true"])
def test_a_branch_never_changes_shape_or_optimizer(flag):
    with pytest.raises(ValueError, match="a branch cannot change"):
        saved = resolved(n_embd=512, options={"opt.eps": 1e-6})
        resume.continued(parse(["--resume=x", flag]), saved, branch=True)
