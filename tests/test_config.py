import dataclasses

import pytest

import checks
import config
import resume
import settings
from config import parse
from settings import Config


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
    cfg = parse([path, "--steps=7", "--batch_size=1e3", "--tied=TRUE", "--grad_clip=none", "--steps=8"])
    assert (cfg.steps, cfg.lr, cfg.batch_size, cfg.tied, cfg.grad_clip) == (8, 1.0, 1000, True, None)
    assert {"steps", "lr", "batch_size", "tied", "grad_clip"} <= cfg.given and "seed" not in cfg.given


def test_a_table_and_a_dotted_key_mean_the_same(tmp_path):
    table = parse([recipe(tmp_path, "[opt]\nbetas = [0.9, 0.95]\neps = 'none'")])
    dotted = parse([recipe(tmp_path, '"opt.betas" = [0.9, 0.95]\n"opt.eps" = "none"')])
    flags = parse(["--opt.betas=0.9,0.95", "--opt.eps=none"])
    assert table.sub("opt") == dotted.sub("opt") == flags.sub("opt") == {"betas": (0.9, 0.95), "eps": None}


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--stepz=3", "did you mean --steps?"),
        ("--learning_rate=3", "did you mean --lr?"),
        ("--ep=2", "there is no field 'ep'"),
        ("--steps", "has no value"),
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
        ("--arch=llama", "modern, gpt2, track3"),
        ("--n_head=3", "for instance --n_head=2"),
        ("--n_kv_head=3", "not divisible by n_kv_head"),
        ("--grad_clip=0", "--grad_clip=none"),
        ("--decay_frac=2", "a share"),
        ("--optimizer.x=2", "there is no field"),
        ("steps=3", "flags look like --steps"),
        ("--out_dir=", "text"),
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


def test_a_recipe_is_never_executed(tmp_path):
    text = '"opt.betas" = "__import__(\'os\').system(\'touch pwned\')"\nout_dir = "$(touch pwned)"'
    cfg = parse([recipe(tmp_path, text), "--opt.eps=__import__('os').getcwd()"])
    assert cfg.options["opt.eps"] == "__import__('os').getcwd()" and not (tmp_path / "pwned").exists()


def test_a_toml_file_written_from_a_config_reads_back_the_same(tmp_path):
    cfg = parse(
        ["--opt.betas=0.9,0.95", '--out_dir=a "b"\\c', "--grad_clip=none", "--lr=1e-3", "--tied=true"]
    )
    again = parse([recipe(tmp_path, config.to_toml(cfg, {"commit": "abc"}))])
    assert config.to_dict(again) == config.to_dict(cfg)
    assert config.to_dict(config.from_dict(config.to_dict(cfg))) == config.to_dict(cfg)


def test_options_are_checked_against_the_signature():
    def target(params, lr=0.1, betas=(0.9, 0.99), nesterov=False, dtype=None): ...

    ok = Config(options={"opt.betas": (0.8, 0.9), "opt.dtype": "float32"})
    given = ("params", "lr")
    assert checks.check_options(ok, "opt", target, given) == {"betas": (0.8, 0.9), "dtype": "float32"}
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
    assert all(f"--{name} " in text for name in settings.FIELDS)
    assert all(f.metadata["help"] for f in settings.FIELDS.values())


def test_every_field_is_used():
    """A flag that does nothing is a defect: each field's name appears outside settings.py and checks.py."""
    from pathlib import Path

    root = Path(config.__file__).parent
    text = "".join((root / name).read_text() for name in ("train.py", "model.py", "choices.py", "watch.py"))
    elsewhere = {"arch", "pp_chunks"}  # in settings.with_traits and settings.chunks
    assert [
        n for n in settings.FIELDS if f"cfg.{n}" not in text and f"{n}:" not in text and n not in elsewhere
    ] == []


def test_every_recipe_in_configs_parses():
    from pathlib import Path

    paths = sorted((Path(config.__file__).parent / "configs").rglob("*.toml"))
    assert len(paths) >= 9
    for path in paths:
        parse([str(path)])


def test_the_default_recipe_is_the_default():
    from pathlib import Path

    path = Path(config.__file__).parent / "configs" / "cpu.toml"
    assert config.to_dict(parse([str(path)])) | {"schedule": "auto"} == config.to_dict(Config())


# ---- continuing ------------------------------------------------------------------------------------------
def resolved(**values) -> dict:
    return config.to_dict(
        dataclasses.replace(settings.with_traits(Config(precision="bf16", schedule="wsd", lr=0.02)), **values)
    )


def test_auto_takes_what_was_chosen_and_may_change_steps_and_schedule():
    cfg = resume.continued(
        parse(["--steps=9", "--schedule=cosine", "--log_every=2"]), resolved(), branch=False
    )
    assert (cfg.steps, cfg.schedule, cfg.log_every, cfg.precision, cfg.lr) == (9, "cosine", 2, "bf16", 0.02)


@pytest.mark.parametrize(
    "flag", ["--lr=0.1", "--seed=2", "--precision=fp32", "--n_layer=5", "--opt.beta=1", "--data=shakespeare"]
)
def test_auto_refuses_another_run_and_names_the_field(flag):
    with pytest.raises(ValueError, match=flag.split("=")[0][2:] + ".*--resume=never"):
        resume.continued(parse([flag]), resolved(), branch=False)


def test_auto_refuses_a_field_that_is_no_longer_given():
    with pytest.raises(ValueError, match="n_embd=512"):
        resume.continued(parse([]), resolved(n_embd=512), branch=False)


def test_a_branch_keeps_what_is_not_given_and_may_change_lr_and_data():
    saved = resolved(n_embd=512, seed=3, options={"opt.eps": 1e-6, "schedule.shape": "sqrt"})
    cfg = resume.continued(parse(["--resume=x", "--lr=0.5", "--data=shakespeare"]), saved, branch=True)
    assert (cfg.n_embd, cfg.seed, cfg.lr, cfg.data, cfg.resume) == (512, 3, 0.5, "shakespeare", "x")
    assert cfg.options == saved["options"]
    cfg = resume.continued(parse(["--resume=x", "--schedule=cosine"]), saved, branch=True)
    assert cfg.options == {"opt.eps": 1e-6}


@pytest.mark.parametrize("flag", ["--n_embd=256", "--optim=adamw", "--opt.eps=1e-8", "--tied=true"])
def test_a_branch_never_changes_shape_or_optimizer(flag):
    with pytest.raises(ValueError, match="a branch cannot change"):
        saved = resolved(n_embd=512, options={"opt.eps": 1e-6})
        resume.continued(parse(["--resume=x", flag]), saved, branch=True)
