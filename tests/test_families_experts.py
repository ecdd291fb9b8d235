"""Mixtral and Qwen3-MoE in and out, without transformers: layouts on disk, settings, biases in the
choice, damaged folders."""

import json

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file, save_file
from test_families import (
    AS_THEIRS,
    CONFIGS,
    bits,
    config_of,
    mlp_names,
    ours_of,
    router_name,
    run_of,
    tensors_of,
    write_folder,
)
from test_families_damaged import config as with_config
from test_families_damaged import listing
from test_families_runs import folder_of, ours_trained, trained
from test_security import nothing_runs

import sample
from checkpoint import __main__ as tool
from checkpoint import families
from checkpoint.load import resolve
from run import pretrained as start

EXPERTS = [name for name in CONFIGS if "expert" in str(CONFIGS[name])]
OWN = "--arch=llama --n_layer=2 --n_expert=4 --n_expert_active=2 --optim=adamw".split()


def stacked(config: dict, tensors: dict) -> dict:
    """The tensors as transformers 5 has them in memory: a layer's experts in two."""
    found = dict(tensors)
    for i in range(config["num_hidden_layers"]):
        front = f"model.layers.{i}"
        names = mlp_names(config, i)
        if len(names) == 1:
            continue
        gate, up, down = (
            torch.stack([found.pop(f"{front}.{theirs[k]}.weight") for theirs in names])
            for k in range(3)
        )
        found[f"{front}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{front}.mlp.experts.down_proj"] = down
        router = found.pop(f"{front}.{router_name(config)}.weight")
        found[f"{front}.mlp.gate.weight"] = router
    return found


def stacked_folder(folder, name: str, n_files: int = 1):
    tensors = stacked(CONFIGS[name], tensors_of(CONFIGS[name], torch.float32))
    write_folder(folder, CONFIGS[name], tensors, n_files)
    return folder


# ---- in ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_one_tensor_are_those_in_many(tmp_path, name):
    want = ours_of(folder_of(tmp_path, name)).state_dict()
    found = ours_of(stacked_folder(tmp_path / "stacked", name, 2)).state_dict()
    assert want.keys() == found.keys() and any("experts.3.gate" in key for key in want)
    for key, x in want.items():
        assert torch.equal(x, found[key]), key
    # And they go out one by one.
    run_of(tmp_path / "stacked", tmp_path / "run", *AS_THEIRS[name])
    tool.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format=hf"])
    assert bits(tmp_path / "out") == bits(tmp_path / name)


@pytest.mark.parametrize(
    "flags",
    ["--data_parallel=zero3", pytest.param("--data_parallel=fsdp", marks=pytest.mark.slow)],
)
def test_a_rank_reads_its_part_of_stacked_experts(tmp_path, flags):
    name = "qwen3_moe_second"
    stacked_folder(tmp_path / "in", name, 2)
    words = [*AS_THEIRS[name], "--steps=2"]
    trained(0, 1, tmp_path / "in", tmp_path / "one", *words)
    run_ranks(2, trained, tmp_path / "in", tmp_path / "two", *words, flags)
    one, two = (resolve(tmp_path / run).tree("model") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert (one[key] - two[key]).abs().max() < 1e-10, key


def test_a_folder_brings_what_its_experts_compute_and_no_balance(tmp_path, capsys):
    cfg = config_of(folder_of(tmp_path, "mixtral"))
    found = [getattr(cfg, name) for name in families.OF_EXPERTS]
    assert found == [4, 2, 0, 80, 1, "softmax", True]
    assert (cfg.arch, cfg.qk_norm, cfg.rope_base) == ("llama", False, 1e6)
    cfg = config_of(folder_of(tmp_path, "qwen3_moe"))
    assert [getattr(cfg, name) for name in families.OF_EXPERTS] == [5, 3, 0, 24, 1, "softmax", True]
    assert (cfg.arch, cfg.qk_norm, cfg.rope_base) == ("qwen3", "gain", 1e4)
    cfg = config_of(folder_of(tmp_path, "qwen3_moe_second"))
    assert (cfg.moe_every, cfg.normalize_gates, cfg.window, cfg.mlp_width) == (2, False, 8, 80)
    assert (cfg.moe_bias_lr, cfg.router_z_loss, cfg.moe_sequence_loss) == (1e-3, 1e-3, None)
    run_of(tmp_path / "mixtral", tmp_path / "run")
    said = capsys.readouterr().out
    assert "router_aux_loss_coef=0.001 is not taken over" in said
    assert "--moe_bias_lr=none keeps it exportable" in said
    run_of(tmp_path / "mixtral", tmp_path / "another", "--moe_bias_lr=none")
    assert "exportable" not in capsys.readouterr().out
    for flag, says in (
        ("--n_expert=8", "n_expert=4 and the command --n_expert=8"),
        ("--expert_width=24", "--expert_width=80"),
        ("--router=sigmoid", "--router=softmax"),
        ("--n_shared_expert=1", "--n_shared_expert=0"),
        ("--normalize_gates=false", "--normalize_gates=true"),
    ):
        with pytest.raises(ValueError, match=says):
            config_of(tmp_path / "mixtral", flag)
    # And a folder without experts gets none.
    with pytest.raises(ValueError, match="leave it out, or type --n_expert=none"):
        config_of(folder_of(tmp_path, "llama"), "--n_expert=8")


def test_the_published_configs_are_read():
    mixtral = dict(
        architectures=["MixtralForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="silu",
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=14336,
        max_position_embeddings=32768,
        model_type="mixtral",
        num_attention_heads=32,
        num_experts_per_tok=2,
        num_hidden_layers=32,
        num_key_value_heads=8,
        num_local_experts=8,
        output_router_logits=False,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.36.0.dev0",
        use_cache=True,
        vocab_size=32000,
    )
    found = families.fields_of(mixtral)
    assert found.fields["expert_width"] == 14336 and found.fields["window"] is None
    assert "router_aux_loss_coef=0.02 " in found.notes[0]
    qwen = dict(
        architectures=["Qwen3MoeForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        decoder_sparse_step=1,
        head_dim=128,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=6144,
        max_position_embeddings=40960,
        max_window_layers=48,
        mlp_only_layers=[],
        model_type="qwen3_moe",
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_key_value_heads=4,
        output_router_logits=False,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=151936,
    )
    found = families.fields_of(qwen).fields
    assert (found["n_expert"], found["expert_width"], found["normalize_gates"]) == (128, 768, True)
    # Its key is another one where transformers 5 has saved it.
    again = {"num_local_experts" if key == "num_experts" else key: x for key, x in qwen.items()}
    assert families.fields_of(again).fields == found


def test_a_missing_key_of_experts_is_transformers_default():
    config = CONFIGS["mixtral"] | {"num_key_value_heads": None}
    del config["rms_norm_eps"], config["num_experts_per_tok"]
    found = families.fields_of(config).fields
    assert (found["norm_eps"], found["n_expert_active"], found["n_kv_head"]) == (1e-5, 2, 4)
    config = CONFIGS["qwen3_moe"] | {"num_experts": 16}
    for key in ("rms_norm_eps", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
        del config[key]
    found = families.fields_of(config).fields
    assert (found["norm_eps"], found["n_expert_active"], found["expert_width"]) == (1e-6, 8, 768)
    assert found["normalize_gates"] is False and found["moe_every"] == 1


@pytest.mark.parametrize(
    "n_layer, step, dense, every",
    [
        (4, 1, [], 1),
        (4, 2, [], 2),
        (5, 3, None, 3),
        (4, 1, [0, 2], 2),
        (6, 2, [1, 3], 6),
        (6, 1, [0, 1, 3, 4], 3),
        (4, 2, [0], 2),
        (4, 1, [9], 1),
        (4, 1, [0], None),
        (4, 1, [3], None),
        (4, 5, [], None),
        (2, 1, [0, 1], None),
    ],
)
def test_which_layers_have_experts_is_one_number_or_refused(n_layer, step, dense, every):
    config = CONFIGS["qwen3_moe"] | {
        "num_hidden_layers": n_layer,
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
    }
    if every is None:
        with pytest.raises(ValueError, match="moe_every-th"):
            families.fields_of(config)
        return
    assert families.fields_of(config).fields["moe_every"] == every
    # As transformers has it.
    theirs = [i not in (dense or []) and (i + 1) % step == 0 for i in range(n_layer)]
    assert theirs == [(i + 1) % every == 0 for i in range(n_layer)]


# ---- damaged -------------------------------------------------------------------------------------
def with_tensors(change):
    def of_folder(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return of_folder


ROUTER = "model.layers.1.mlp.gate.weight"
UP = "model.layers.0.mlp.experts.4.up_proj.weight"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DAMAGE = {
    "an expert is missing": (with_tensors(lambda t: t.pop(UP)), f"has no tensor {UP}"),
    "an expert too many": (
        with_tensors(lambda t: t.update({UP.replace(".4.", ".5."): torch.ones(24, 32)})),
        "experts.5.up_proj.weight' that this model lacks",
    ),
    "an expert of another shape": (
        with_tensors(lambda t: t.update({UP: torch.ones(25, 32)})),
        r"is \(25, 32\), not \(24, 32\)",
    ),
    "an expert of integers": (
        with_tensors(lambda t: t.update({UP: torch.ones(24, 32, dtype=torch.int32)})),
        "is I32",
    ),
    "no router": (with_tensors(lambda t: t.pop(ROUTER)), f"has no tensor {ROUTER}"),
    "a router of fewer experts": (
        with_tensors(lambda t: t.update({ROUTER: torch.ones(4, 32)})),
        r"is \(4, 32\), not \(5, 32\)",
    ),
    "a bias that no family has": (
        with_tensors(lambda t: t.update({"model.layers.1.mlp.gate.bias": torch.ones(5)})),
        "this model lacks",
    ),
    "no num_experts": (with_config(num_experts=...), "has no num_experts"),
    "no experts": (with_config(num_experts=0), "num_experts=0"),
    "one expert": (with_config(num_experts=1, num_experts_per_tok=1), "n_expert=1"),
    "two numbers of experts": (
        with_config(num_local_experts=4),
        "num_experts=5 and num_local_experts=4",
    ),
    "more experts than there are": (with_config(num_experts=6), "does not fit"),
    "experts that are text": (with_config(num_experts="5"), "num_experts='5'"),
    "more active than there are": (
        with_config(num_experts_per_tok=6),
        "num_experts_per_tok=6, more than its 5",
    ),
    "another width": (with_config(moe_intermediate_size=32), "does not fit"),
    "a width that is text": (
        with_config(moe_intermediate_size=[24]),
        r"moe_intermediate_size=\[24",
    ),
    "scores by a sigmoid": (with_config(scoring_func="sigmoid"), "'scoring_func'='sigmoid'"),
    "shared experts": (with_config(n_shared_experts=1), "'n_shared_experts'=1"),
    "a factor of the gates": (with_config(routed_scaling_factor=2.5), "routed_scaling_factor"),
    "groups of experts": (with_config(n_group=8), "n_group"),
    "gates that are text": (with_config(norm_topk_prob="yes"), "norm_topk_prob='yes'"),
    "a step of 0": (with_config(decoder_sparse_step=0), "decoder_sparse_step=0"),
    "layers that are text": (with_config(mlp_only_layers="0"), "mlp_only_layers='0'"),
    "layers of true": (with_config(mlp_only_layers=[True]), r"mlp_only_layers=\[True\]"),
    "layers with and without": (with_config(mlp_only_layers=[1]), r"with experts are \[0\]"),
    "a loss that is text": (with_config(router_aux_loss_coef="x"), "router_aux_loss_coef='x'"),
    "biases of attention alone": (with_config(attention_bias=True), "must agree"),
}
# Of the form with a layer's experts in two tensors.
DAMAGE_OF_STACKS = {
    "too few experts": (
        with_tensors(lambda t: t.update({GATE_UP: torch.ones(4, 48, 32)})),
        "has no expert 4",
    ),
    "too many experts": (
        with_tensors(lambda t: t.update({GATE_UP: torch.ones(6, 48, 32)})),
        "gate_up_proj is of 6 experts, not 5",
    ),
    "gate and up that are not equal": (
        with_tensors(lambda t: t.update({GATE_UP: torch.ones(5, 47, 32)})),
        "is no gate and up together",
    ),
    "another width": (
        with_tensors(lambda t: t.update({GATE_UP: torch.ones(5, 50, 32)})),
        r"is \(25, 32\), not \(24, 32\)",
    ),
    "no dimension": (with_tensors(lambda t: t.update({GATE_UP: torch.ones(())})), "no expert 0"),
    "a dimension": (with_tensors(lambda t: t.update({GATE_UP: torch.ones(5)})), "no gate and up"),
    "no stack": (with_tensors(lambda t: t.pop(GATE_UP)), "has no tensor .*experts.0.gate_proj"),
    "both forms": (
        with_tensors(lambda t: t.update({UP: torch.ones(24, 32)})),
        "each of them our blocks.0.mlp.experts.4.fc",
    ),
}


@pytest.mark.parametrize("damage", [*DAMAGE, *[f"stacked: {name}" for name in DAMAGE_OF_STACKS]])
def test_a_damaged_folder_with_experts_is_a_sentence(tmp_path, damage):
    folder = tmp_path / "qwen3_moe"
    if damage in DAMAGE:
        change, says = DAMAGE[damage]
        folder_of(tmp_path, "qwen3_moe", 1)
    else:
        change, says = DAMAGE_OF_STACKS[damage.removeprefix("stacked: ")]
        stacked_folder(folder, "qwen3_moe")
    change(folder)
    before = listing(tmp_path)
    with nothing_runs(), pytest.raises(ValueError, match=says) as error:
        run_of(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert listing(tmp_path) - before <= {"text.txt", "out", "out/.lock"}


# ---- runs of ours, and out -----------------------------------------------------------------------
def test_a_run_brings_its_experts_and_their_bias(tmp_path):
    flags = ["--moe_bias_lr=0.25", "--n_shared_expert=1", "--router=sigmoid", "--moe_every=2"]
    run = ours_trained(tmp_path, *OWN, *flags)
    want = resolve(run).tree("model")
    bias = want["blocks.1.mlp.selection_bias"]
    assert bias.any() and "blocks.0.mlp.selection_bias" not in want
    (tmp_path / "next").mkdir()
    words = [f"--init_from={run}", "--optim=sgd", "--lr=0", "--moe_bias_lr=none"]
    again = ours_trained(tmp_path / "next", *[*words, "--n_layer=2"])
    found = resolve(again)
    for key, x in want.items():
        assert torch.equal(found.tensor(f"model/{key}"), x), key
    config = found.tree("config")
    said = {name: config[name] for name in families.OF_EXPERTS}
    assert said == {
        "n_expert": 4,
        "n_expert_active": 2,
        "n_shared_expert": 1,
        "expert_width": 48,
        "moe_every": 2,
        "router": "sigmoid",
        "normalize_gates": True,
    }
    # What one samples with chooses as the run does.
    model, _ = sample.load(again)
    assert torch.equal(model.blocks["1"].mlp.selection_bias, bias)
    sample.main([again, "--tokens=3", "--prompt=To be"])
    with pytest.raises(ValueError, match="n_expert=4 and the command --n_expert=8"):
        config_of(run, "--n_expert=8")
    with pytest.raises(ValueError, match="expert_width=48 and the command --expert_width=16"):
        config_of(run, "--expert_width=16")


def test_a_run_without_experts_says_nothing_of_their_traits(tmp_path):
    run = ours_trained(tmp_path, "--optim=adamw")
    assert config_of(run).n_expert is None
    with pytest.raises(ValueError, match="n_expert_active means nothing without experts"):
        config_of(run, "--n_expert_active=3")


def test_our_own_export_has_the_bias(tmp_path):
    run = ours_trained(tmp_path, *OWN, "--moe_bias_lr=0.25")
    out = tmp_path / "w.safetensors"
    tool.main(["export", run, str(out)])
    shape = [*OWN, "--n_embd=32", "--n_head=2", "--block_size=16"]
    cfg = config_of(out, *shape)
    model = ours_of(out, torch.float32, *shape)
    bias = model.blocks["0"].mlp.selection_bias
    start.weights(out).fill(bias, "blocks.0.mlp.selection_bias")
    assert bias.any() and start.shapes(cfg)["blocks.0.mlp.selection_bias"] == (4,)
    with pytest.raises(ValueError, match="no option of export"):
        tool.main(["export", run, str(tmp_path / "x"), "--selection_bias=keep"])
    with pytest.raises(ValueError, match="is for --format=hf"):
        tool.main(["export", run, str(tmp_path / "x"), "--selection_bias=drop"])


def test_a_bias_in_the_choice_is_zeros_at_first_and_not_exported_once_it_has_moved(
    tmp_path, capsys
):
    folder = folder_of(tmp_path, "qwen3_moe")
    weights = start.weights(folder)
    name = "blocks.0.mlp.selection_bias"
    bias = torch.ones(5)
    weights.fill(bias, name)
    assert not bias.any() and not weights(name, (5,)).any()
    run_of(folder, tmp_path / "run", "--moe_bias_lr=0.25")
    assert resolve(tmp_path / "run").tensor(f"model/{name}").any()
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format=hf"]
    with pytest.raises(ValueError, match="selection_bias, which no family") as error:
        tool.main(words)
    assert "--moe_bias_lr=none" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))
    tool.main([*words, "--selection_bias=drop"])
    said = capsys.readouterr().out
    assert "its selection_bias is left out" in said
    assert bits(tmp_path / "out") == bits(folder)
    # What the sentence says to type.
    run_of(tmp_path / "out", tmp_path / "next", "--moe_bias_lr=none")
    words = ["export", str(tmp_path / "next")]
    tool.main([*words, str(tmp_path / "again"), "--format=hf"])
    assert "left out" not in capsys.readouterr().out
    tool.main([*words, str(tmp_path / "again-2"), "--format=hf", "--selection_bias=drop"])
    assert "there is no selection_bias to leave out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, family, said",
    [
        ("--arch=llama", "mixtral", dict(num_local_experts=4, intermediate_size=64)),
        (
            "--arch=llama --expert_width=40 --window=8",
            "mixtral",
            dict(intermediate_size=40, sliding_window=8),
        ),
        (
            "--arch=qwen3 --moe_every=2 --normalize_gates=false --expert_width=40",
            "qwen3_moe",
            dict(
                num_experts=4,
                moe_intermediate_size=40,
                intermediate_size=128,
                decoder_sparse_step=2,
                norm_topk_prob=False,
            ),
        ),
    ],
)
def test_a_run_of_ours_with_experts_goes_out(tmp_path, flags, family, said):
    run = ours_trained(tmp_path, *OWN, "--moe_bias_lr=none", *flags.split())
    tool.main(["export", run, str(tmp_path / "out"), "--format=hf"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == family
    assert {key: config.get(key) for key in said} == said
    model, _ = sample.load(run)
    again = ours_of(tmp_path / "out")
    ids = torch.randint(256, (1, 16))
    assert torch.allclose(again(ids), model(ids)[..., :256], atol=1e-6)


@pytest.mark.parametrize(
    "flags, traits",
    [
        ("--arch=llama --router=sigmoid --n_shared_expert=1", "router=sigmoid, n_shared_expert=1"),
        ("--arch=llama --moe_every=2", "moe_every=2"),
        ("--arch=llama --normalize_gates=false", "normalize_gates=False"),
        ("--arch=qwen3 --n_shared_expert=2", "n_shared_expert=2"),
        ("--arch=gpt2", "norm=layernorm, activation=gelu, position=learned"),
        ("--arch=qwen3 --activation=gelu", "activation=gelu"),
        ("--arch=llama --bias=true", "bias=True"),
    ],
)
def test_experts_that_no_family_has_are_refused_with_every_trait(tmp_path, flags, traits):
    run = ours_trained(tmp_path, *OWN, "--moe_bias_lr=none", *flags.split())
    with pytest.raises(ValueError, match="nearest is (mixtral|qwen3_moe)") as error:
        tool.main(["export", run, str(tmp_path / "out"), "--format=hf"])
    for trait in traits.split(", "):
        assert trait in str(error.value)
    assert not list(tmp_path.glob("out*"))
