import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, TrainingArguments
from trl import DPOConfig, SFTConfig

import forge
from forge import ForgeError, ForgeWarning, Preset, UnknownNameError, UnsupportedError, get_preset, list_presets

NAMES = ("qlora", "lora", "sft", "dpo")
HARDWARE = ("cpu", "turing", "ampere", "hopper")


def llama(billions: float) -> LlamaConfig:
    """A llama of about this many parameters: 12 h^2 per layer."""
    layers = 40
    hidden = int((billions * 1e9 / (12 * layers)) ** 0.5) // 128 * 128
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=1000,
        max_position_embeddings=4096,
    )


def test_the_list():
    assert tuple(list_presets()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_real_objects(name):
    preset = get_preset(name, hardware="cpu")
    assert type(preset.get_training_args()) is TrainingArguments
    assert type(preset.get_sft_config()) is SFTConfig
    assert type(preset.get_dpo_config()) is DPOConfig
    assert isinstance(preset.get_lora_config(), LoraConfig) == (name != "sft")
    assert isinstance(preset.get_bnb_config(), BitsAndBytesConfig) == (name == "qlora")
    assert preset.model_kwargs()["device_map"] == {"": "cpu"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_foreign_warnings")
def test_no_value_that_forge_chose_warns(name):
    preset = get_preset(name, hardware="cpu")
    preset.get_training_args()
    preset.get_sft_config()
    preset.get_dpo_config()
    preset.get_lora_config()
    preset.get_bnb_config()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hardware", HARDWARE)
def test_a_preset_for_absent_hardware_can_do_all_but_train(name, hardware, tmp_path, capsys):
    preset = get_preset(name, hardware=hardware)
    preset.print_info()
    assert "learning_rate" in capsys.readouterr().out
    assert preset.explain("optim").value
    preset.save(tmp_path / "preset.json")
    assert Preset.load(tmp_path / "preset.json") == preset
    assert preset.model_kwargs()
    preset.get_lora_config()
    if hardware == "cpu" or torch.cuda.is_available():
        return
    for build in (preset.get_training_args, preset.get_sft_config, preset.get_dpo_config):
        with pytest.raises(UnsupportedError, match='hardware="cpu"'):
            build()


def test_output_dir_may_be_set_afterwards():
    args = get_preset("qlora", hardware="cpu").get_training_args()
    args.output_dir = "elsewhere"
    assert args.output_dir == "elsewhere"


@pytest.mark.parametrize(
    ("name", "billions", "rate"),
    [
        ("qlora", 8, 2e-4),
        ("lora", 13, 2e-4),
        ("lora", 33, 1e-4),
        ("sft", 8, 2e-5),
        ("sft", 13, 1e-5),
        ("sft", 70, 5e-6),
        ("dpo", 8, 5e-6),
        ("dpo", 70, 5e-6),
    ],
)
def test_learning_rates_by_size(name, billions, rate):
    assert get_preset(name, hardware="hopper", model=llama(billions)).choices["learning_rate"].value == rate


@pytest.mark.parametrize(
    ("name", "build", "rate"),
    [
        ("qlora", "get_dpo_config", 5e-6),
        ("lora", "get_dpo_config", 5e-6),
        ("sft", "get_dpo_config", 5e-7),
        ("dpo", "get_dpo_config", 5e-6),
        ("dpo", "get_sft_config", 2e-4),
        ("dpo", "get_training_args", 5e-6),
        ("sft", "get_sft_config", 2e-5),
    ],
)
def test_each_config_has_the_rate_of_its_objective(name, build, rate):
    assert getattr(get_preset(name, hardware="cpu"), build)().learning_rate == rate


def test_dpo_above_its_limit_warns_with_the_reason():
    with pytest.warns(ForgeWarning, match="learning_rate=0.0001 for DPO.*run away"):
        preset = get_preset("dpo", hardware="cpu", learning_rate=1e-4)
    preset.get_dpo_config()  # said once is enough
    with pytest.warns(ForgeWarning, match="run away"):
        get_preset("lora", hardware="cpu", learning_rate=1e-4).get_dpo_config()
    get_preset("dpo", hardware="cpu", learning_rate=1e-5)


def test_dpo_keeps_no_reference_copy():
    assert not get_preset("dpo", hardware="cpu").get_dpo_config().precompute_ref_log_probs
    assert get_preset("dpo", hardware="cpu", use_peft=False).get_dpo_config().precompute_ref_log_probs


def test_alpha_is_held_when_r_changes_and_says_what_that_does():
    preset = get_preset("qlora", hardware="cpu", lora_r=64)
    assert preset.get_lora_config().lora_alpha == 32
    assert "alpha/r = 0.5" in str(preset.explain("lora_alpha"))
    assert "alpha/sqrt(r) = 4" in str(preset.replace(use_rslora=True).explain("lora_alpha"))


def test_max_length_stays_within_the_model():
    preset = get_preset("lora", hardware="cpu", model=LlamaConfig(max_position_embeddings=512, num_hidden_layers=1))
    assert preset.get_sft_config().max_length == 512


@pytest.mark.parametrize("name", NAMES)
def test_every_value_answers_explain(name):
    preset = get_preset(name, hardware="ampere")
    for key, choice in preset.choices.items():
        answer = preset.explain(key)
        assert answer.value == choice.value
        assert len(answer.reason) > 10
        assert str(answer).startswith(f"{key} = ")


def test_explain_what_the_recipe_leaves_alone():
    preset = get_preset("sft", hardware="cpu")
    assert preset.explain("weight_decay").value == 0.0
    assert "no adapter" in preset.explain("use_dora").reason
    assert "not quantised" in preset.explain("bnb_4bit_quant_type").reason
    assert "get_dpo_config() only" in preset.explain("beta").reason
    with pytest.raises(UnknownNameError, match="learning_rate"):
        preset.explain("learning_rte")


def test_explain_says_what_the_user_changed():
    answer = get_preset("lora", hardware="cpu", learning_rate=1e-3).explain("learning_rate")
    assert answer.overridden
    assert "set by you; the recipe has 0.0002" in answer.reason


def test_print_info_is_readable_at_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    get_preset("qlora", hardware="hopper", lora_r=32).print_info()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "per_device_train_batch_size" in out
    assert "32 (yours)" in out
    assert "4 x 4 x 1 = 16" in " ".join(out.split())


def test_diff():
    lora = get_preset("lora", hardware="cpu")
    assert lora.diff(get_preset("lora", hardware="cpu")).rows == ()
    assert "do not differ" in str(lora.diff("lora"))
    rows = {name: (mine, theirs) for name, mine, theirs, _ in lora.diff("sft").rows}
    assert rows["learning_rate"] == (2e-4, 2e-5)
    assert rows["lora_r"] == (16, "-")
    with pytest.raises(UnknownNameError, match="'qlora'"):
        lora.diff("qlor")


def test_diff_with_trl_shows_the_installed_defaults():
    rows = {name: (mine, theirs) for name, mine, theirs, _ in get_preset("lora", hardware="cpu").diff("trl").rows}
    assert rows["lora_r"] == (16, LoraConfig().r)
    assert rows["learning_rate"] == (2e-4, SFTConfig.__dataclass_fields__["learning_rate"].default)
    assert "report_to" not in rows or rows["report_to"][0] == "none"


def test_save_and_load(tmp_path):
    preset = get_preset("qlora", hardware="cpu", model=LlamaConfig(num_hidden_layers=2), lora_r=8, max_length=99)
    preset.save(tmp_path / "preset.json")
    loaded = Preset.load(tmp_path / "preset.json")
    assert loaded == preset
    assert loaded.get_lora_config() == preset.get_lora_config()
    assert loaded.get_sft_config().to_dict() == preset.get_sft_config().to_dict()
    assert loaded.replace(lora_r=4).get_lora_config().r == 4


def test_a_saved_preset_keeps_its_values_when_the_recipe_changes(tmp_path):
    path = tmp_path / "preset.json"
    get_preset("lora", hardware="cpu").save(path)
    record = json.loads(path.read_text())
    record["tables"]["sft"]["learning_rate"]["value"] = 3e-4
    path.write_text(json.dumps(record))
    assert Preset.load(path).get_sft_config().learning_rate == 3e-4


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"learning_rate": 1}', '{"forge_preset": 99}', '{"forge_preset": 1}', "\x00"]
)
def test_loading_something_else(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ForgeError, match=r"x\.json"):
        Preset.load(tmp_path / "x.json")


def test_saving_what_json_cannot_hold_names_it_and_writes_nothing(tmp_path):
    preset = get_preset("lora", hardware="cpu", optim_args=object())
    with pytest.raises(ForgeError, match="optim_args"):
        preset.save(tmp_path / "preset.json")
    assert not (tmp_path / "preset.json").exists()


def test_a_named_profile_needs_no_torch():
    """The command line builds presets; it must not wait for torch."""
    code = "import sys, forge; forge.get_preset('qlora', hardware='hopper', lora_r=8); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_public_names():
    assert set(forge.__all__) <= set(dir(forge))
    assert all(getattr(forge, name) for name in forge.__all__)


def test_a_preset_does_not_change_behind_its_back():
    targets = ["q_proj"]
    preset = get_preset("lora", hardware="ampere", target_modules=targets, modules_to_save=["lm_head"])
    targets.append("zzz")
    config = preset.get_lora_config()
    config.modules_to_save.append("X")
    config.target_modules.add("Y")
    preset.model_kwargs()["device_map"]["x"] = 1
    assert preset.get_lora_config().modules_to_save == ["lm_head"]
    assert preset.get_lora_config().target_modules == {"q_proj"}
    assert preset.model_kwargs()["device_map"] == {"": 0}


def test_the_users_values_do_not_carry_our_sources():
    preset = get_preset("lora", hardware="cpu", learning_rate=3e-3, lora_r=8, effective_batch_size=64)
    for name in ("learning_rate", "lora_r", "effective_batch_size"):
        answer = preset.explain(name)
        assert answer.overridden
        assert not answer.source
        assert answer.reason.startswith("set by you")
    assert not get_preset("lora", hardware="cpu", precision="bf16").explain("precision").hardware_rule


def test_full_fine_tuning_says_what_its_precision_is_of():
    preset = get_preset("sft", hardware="hopper")
    assert "the weights themselves are fp32" in preset.explain("precision").reason
    assert preset.model_kwargs()["dtype"] is torch.float32


def test_defaults_are_those_of_the_objective():
    assert get_preset("dpo", hardware="cpu").explain("loss_type").value == ["sigmoid"]
    assert get_preset("lora", hardware="cpu").explain("loss_type").value == "nll"
    assert "in SFTConfig only" in get_preset("dpo", hardware="cpu").explain("eval_packing").reason


def test_replace():
    preset = get_preset("lora", hardware="cpu", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert preset.replace(effective_batch_size=32).choices["gradient_accumulation_steps"].value == 8
    assert preset.replace(gradient_accumulation_steps=None).choices["gradient_accumulation_steps"].value == 4
    with pytest.warns(ForgeWarning, match="run away"):
        get_preset("dpo", hardware="cpu").replace(learning_rate=1e-3)
    with pytest.raises(UnknownNameError, match="build the preset anew"):
        preset.replace(hardware="hopper")


def test_embeddings_that_are_shared_stay_shared():
    tied, untied = (LlamaConfig(num_hidden_layers=1, tie_word_embeddings=tie) for tie in (True, False))
    save = {"modules_to_save": ["lm_head", "embed_tokens"]}
    assert get_preset("lora", hardware="cpu", model=tied, **save).get_lora_config().ensure_weight_tying
    assert not get_preset("lora", hardware="cpu", model=untied, **save).get_lora_config().ensure_weight_tying


def test_a_profile_of_ones_own_cannot_be_saved(tmp_path):
    from dataclasses import replace

    from forge import Hardware

    mine = replace(Hardware.named("ampere"), attn_implementation="eager")
    preset = get_preset("lora", hardware=mine)
    assert preset.model_kwargs()["attn_implementation"] == "eager"
    with pytest.raises(ForgeError, match="a profile of your own"):
        preset.save(tmp_path / "preset.json")


def test_the_revision_and_remote_code_go_where_the_model_is_loaded():
    preset = get_preset("lora", hardware="cpu", revision="abc", trust_remote_code=True)
    assert preset.model_kwargs()["revision"] == "abc"
    assert preset.model_kwargs()["trust_remote_code"] is True
    preset.get_training_args()
