import pytest

from forge import ConflictError, ForgeError, UnknownNameError, UnsupportedError, get_preset
from forge.presets.names import GONE, fields_by_object, owners


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("lora_alfa", "lora_alpha"),
        ("num_epochs", "num_train_epochs"),
        ("target_module", "target_modules"),
        ("use_rs_lora", "use_rslora"),
        ("bnb_4bit_quanttype", "bnb_4bit_quant_type"),
        ("effective_batch", "effective_batch_size"),
    ],
)
def test_unknown_names_name_the_nearest(typed, nearest):
    with pytest.raises(UnknownNameError, match=f"'{nearest}'"):
        get_preset("qlora", hardware="cpu", **{typed: 1})


@pytest.mark.parametrize("name", sorted(GONE))
def test_names_of_the_past_say_what_to_type_instead(name):
    if owners(name):  # an older transformers still has it
        pytest.skip(f"the installed libraries still know {name}")
    with pytest.raises(UnknownNameError) as caught:
        get_preset("qlora", hardware="cpu", **{name: 1})
    assert f"Use {GONE[name]}" in str(caught.value)
    remedy = GONE[name].partition(" ")[0].partition("=")[0].rstrip(",:")
    if remedy not in ("nothing", "the", "precision", "from_pretrained's", "LoraConfig's"):
        assert owners(remedy), "the remedy must be a name that exists"


def test_unknown_presets_and_profiles_name_the_nearest():
    with pytest.raises(UnknownNameError, match="'qlora'"):
        get_preset("qlorra", hardware="cpu")
    with pytest.raises(UnknownNameError, match="'hopper'"):
        get_preset("qlora", hardware="hoper")


def test_two_names_of_one_thing():
    assert get_preset("lora", hardware="cpu", r=8).get_lora_config().r == 8
    assert get_preset("lora", hardware="cpu", r=8, lora_r=8).get_lora_config().r == 8
    with pytest.raises(ConflictError, match="lora_r is given twice, as 8 and 16"):
        get_preset("lora", hardware="cpu", r=8, lora_r=16)
    assert get_preset("lora", hardware="cpu", gradient_checkpointing=True).choices["activation_checkpointing"].value


@pytest.mark.parametrize(
    ("build", "override"),
    [
        ("get_sft_config", {"beta": 0.2}),
        ("get_training_args", {"beta": 0.2}),
        ("get_training_args", {"max_length": 512}),
        ("get_training_args", {"packing": True}),
        ("get_dpo_config", {"packing": True}),
    ],
)
def test_a_field_that_the_object_does_not_have_is_refused(build, override):
    preset = get_preset("lora", hardware="cpu", **override)
    with pytest.raises(UnsupportedError, match=f"has no field '{next(iter(override))}'"):
        getattr(preset, build)()


def test_a_field_that_the_object_has_arrives():
    preset = get_preset("dpo", hardware="cpu", beta=0.2, max_length=99, weight_decay=0.01, use_dora=True)
    config = preset.get_dpo_config()
    assert (config.beta, config.max_length, config.weight_decay) == (0.2, 99, 0.01)
    assert preset.get_lora_config().use_dora


@pytest.mark.parametrize(
    "override",
    [
        {"learning_rate": -1e-4},
        {"learning_rate": "2e-4"},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"lora_r": 0},
        {"lora_r": 8.0},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"num_train_epochs": 0},
        {"max_length": 0},
        {"beta": -1},
        {"use_peft": "yes"},
        {"bf16": None},
        {"bf16": "false"},
        {"load_in_4bit": "false"},
        {"use_rslora": "no"},
        {"packing": "yes"},
        {"max_steps": "10"},
        {"dtype": "bf16"},
        {"dtype": "load"},
    ],
)
def test_values_that_no_trainer_could_use_are_refused(override):
    (name, value), *_ = override.items()
    with pytest.raises(ForgeError) as caught:
        get_preset("lora", hardware="cpu", **override)
    assert str(caught.value).startswith(f"{name}={value!r}: it must be")


def test_no_field_name_belongs_to_two_kinds_of_object():
    """One flat vocabulary works only as long as this holds."""
    known = fields_by_object()
    training = known["TrainingArguments"] | known["SFTConfig"] | known["DPOConfig"]
    assert not training & known["LoraConfig"]
    assert not training & known["BitsAndBytesConfig"]
    assert not known["LoraConfig"] & known["BitsAndBytesConfig"]
    # These two mean the same model everywhere, and go everywhere.
    assert (training | known["LoraConfig"]) & known["from_pretrained"] <= {"revision", "trust_remote_code"}
