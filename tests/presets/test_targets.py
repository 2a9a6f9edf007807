"""LoRA targets that the user names, held against the model."""

import pytest
from transformers import BertConfig, LlamaConfig

from forge import ForgeError, UnknownNameError, UnsupportedError, get_preset

LLAMA = LlamaConfig(num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["self_attn.q_proj", "lm_head"],
        ["model.layers.2.self_attn.q_proj"],
        r".*\.layers\.2\..*_proj",
        "all-linear",
        ["embed_tokens", "q_proj"],
    ],
)
def test_targets_that_the_model_has(targets):
    config = get_preset("lora", hardware="cpu", model=LLAMA, target_modules=targets).get_lora_config()
    assert config.target_modules in (targets, set(targets))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, UnknownNameError, "'v_porj'.*'v_proj'"),
        ({"target_modules": ["c_attn"]}, UnknownNameError, "linear layer of this llama"),
        ({"target_modules": []}, ForgeError, "nothing would be adapted"),
        ({"target_modules": None}, ForgeError, "nothing would be adapted"),
        ({"target_modules": "q_proj"}, ForgeError, r"regular expression.*target_modules=\['q_proj'\]"),
        ({"target_modules": "nonsense"}, ForgeError, "matches no linear layer"),
        ({"layers_to_transform": [0, 99]}, ForgeError, r"layers 0 to 2, not \[99\]"),
        ({"layers_to_transform": 3}, ForgeError, "layers 0 to 2"),
    ],
)
def test_targets_that_it_does_not_have(override, error, message):
    with pytest.raises(error, match=message):
        get_preset("lora", hardware="cpu", model=LLAMA, **override)


def test_models_that_are_not_decoders():
    with pytest.raises(UnsupportedError, match="is an encoder"):
        get_preset("lora", hardware="cpu", model=BertConfig())


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ForgeError, match=r"has no config\.json"):
        get_preset("lora", hardware="cpu", model=tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ForgeError, match=r"holds an adapter.*'some/base'"):
        get_preset("lora", hardware="cpu", model=str(tmp_path))
    for missing in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(ForgeError, match="There is no folder"):
            get_preset("lora", hardware="cpu", model=missing)
