import pytest
import torch

from forge import ConflictError, UnknownNameError, get_preset

ACCEPTED = [
    # (preset, overrides, hardware) -> (weights, dtype of the rest, autocast)
    ("qlora", {}, "cpu", ("nf4", "float32", None)),
    ("qlora", {}, "ampere", ("nf4", "bfloat16", "bf16")),
    ("qlora", {}, "turing", ("nf4", "float16", "fp16")),
    ("qlora", {"precision": "fp4"}, "hopper", ("fp4", "bfloat16", "bf16")),
    ("qlora", {"precision": "int8"}, "hopper", ("int8", "bfloat16", "bf16")),
    ("qlora", {"bnb_4bit_quant_type": "fp4"}, "hopper", ("fp4", "bfloat16", "bf16")),
    ("qlora", {"precision": "fp4", "load_in_4bit": True}, "hopper", ("fp4", "bfloat16", "bf16")),
    ("qlora", {"precision": "bf16"}, "hopper", ("bf16", "bfloat16", "bf16")),
    ("qlora", {"bnb_4bit_compute_dtype": torch.float32}, "hopper", ("nf4", "float32", None)),
    ("qlora", {"bf16": False}, "hopper", ("nf4", "bfloat16", None)),
    ("lora", {}, "cpu", ("fp32", "float32", None)),
    ("lora", {}, "turing", ("fp16", "float16", "fp16")),
    ("lora", {}, "hopper", ("bf16", "bfloat16", "bf16")),
    ("lora", {"precision": "bf16"}, "cpu", ("bf16", "bfloat16", "bf16")),
    ("lora", {"fp16": True}, "hopper", ("fp16", "float16", "fp16")),
    ("lora", {"precision": "fp32"}, "hopper", ("fp32", "float32", None)),
    ("lora", {"precision": "nf4"}, "cpu", ("nf4", "float32", None)),
    ("lora", {"load_in_8bit": True}, "hopper", ("int8", "bfloat16", "bf16")),
    ("dpo", {"precision": "nf4"}, "ampere", ("nf4", "bfloat16", "bf16")),
    ("sft", {}, "cpu", ("fp32", "float32", None)),
    ("sft", {}, "hopper", ("bf16", "float32", "bf16")),
    ("sft", {}, "turing", ("fp16", "float32", "fp16")),
    ("sft", {"use_peft": True}, "hopper", ("bf16", "bfloat16", "bf16")),
    ("dpo", {"use_peft": False}, "hopper", ("bf16", "float32", "bf16")),
    ("lora", {"dtype": "float16"}, "ampere", ("fp16", "float16", "fp16")),
    ("lora", {"dtype": torch.float32}, "ampere", ("fp32", "float32", None)),
    ("qlora", {"dtype": "bfloat16"}, "hopper", ("nf4", "bfloat16", "bf16")),
]


@pytest.mark.parametrize(("name", "overrides", "hardware", "expected"), ACCEPTED)
def test_number_formats(name, overrides, hardware, expected):
    preset = get_preset(name, hardware=hardware, **overrides)
    value = {key: choice.value for key, choice in preset.choices.items()}
    weights, dtype, autocast = expected
    assert value["precision"] == weights
    assert value["dtype"] == dtype
    assert (value["bf16"], value["fp16"]) == (autocast == "bf16", autocast == "fp16")
    bnb = preset.get_bnb_config()
    if weights in ("nf4", "fp4"):
        assert (bnb.load_in_4bit, bnb.bnb_4bit_quant_type) == (True, weights)
        assert str(bnb.bnb_4bit_compute_dtype) == f"torch.{dtype}"
    elif weights == "int8":
        assert bnb.load_in_8bit
    else:
        assert bnb is None


@pytest.mark.parametrize(
    ("name", "overrides", "hardware", "message"),
    [
        ("qlora", {"load_in_4bit": True, "load_in_8bit": True}, "cpu", "load_in_4bit=True and load_in_8bit=True"),
        ("lora", {"fp16": True, "bf16": True}, "ampere", "fp16=True and bf16=True"),
        ("qlora", {"precision": "nf4", "load_in_8bit": True}, "cpu", "precision='nf4' and load_in_8bit=True"),
        ("qlora", {"precision": "nf4", "bnb_4bit_quant_type": "fp4"}, "cpu", "bnb_4bit_quant_type='fp4'"),
        ("qlora", {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "cpu", "load_in_8bit=True and"),
        ("lora", {"precision": "bf16", "load_in_4bit": True}, "ampere", "precision='bf16' and load_in_4bit=True"),
        ("qlora", {"load_in_4bit": False}, "cpu", "get_preset\\('lora'\\)"),
        ("lora", {"precision": "nf4", "load_in_4bit": False}, "cpu", "load_in_4bit=False contradicts"),
        ("lora", {"precision": "bf16", "fp16": True}, "ampere", "precision='bf16' and fp16=True"),
        ("lora", {"precision": "bf16"}, "turing", "precision='fp16'"),
        ("qlora", {"bf16": True}, "turing", "bf16 on hardware 'turing'"),
        ("lora", {"precision": "fp16"}, "cpu", "only on a GPU"),
        ("sft", {"precision": "nf4"}, "ampere", "get_preset\\('qlora'\\)"),
        ("qlora", {"use_peft": False}, "ampere", "quantised as 'nf4' cannot be trained"),
        ("lora", {"precision": "bf16", "dtype": "float32"}, "ampere", "precision='bf16' and dtype='float32'"),
        ("lora", {"dtype": "float16"}, "cpu", "only on a GPU"),
        ("lora", {"bnb_4bit_compute_dtype": "float16"}, "ampere", "nothing would read it.*precision='nf4'"),
        ("sft", {"llm_int8_threshold": 3.0}, "ampere", "nothing would read it.*precision='int8'"),
        ("qlora", {"precision": "int8", "bnb_4bit_use_double_quant": True}, "ampere", "nothing would read it"),
        ("lora", {"tf32": True}, "cpu", "tf32=True on hardware 'cpu'"),
        ("lora", {"tf32": True}, "turing", "no TF32"),
        ("lora", {"use_cpu": True}, "ampere", 'hardware="cpu"'),
        ("lora", {"use_cpu": False}, "cpu", "the profile of your GPU"),
        ("lora", {"optim": "paged_adamw_8bit"}, "cpu", "CUDA only"),
        ("lora", {"packing": True, "max_length": None}, "cpu", "the length that rows are packed to"),
        ("sft", {"lora_r": 8}, "cpu", "there is no adapter"),
        ("dpo", {"use_peft": False, "target_modules": ["q_proj"]}, "cpu", "there is no adapter"),
    ],
)
def test_contradictions_are_refused(name, overrides, hardware, message):
    with pytest.raises(ConflictError, match=message):
        get_preset(name, hardware=hardware, **overrides)


def test_unknown_precision_names_the_nearest():
    with pytest.raises(UnknownNameError, match="'nf4'"):
        get_preset("qlora", hardware="cpu", precision="nf44")


def test_a_live_quantised_model_decides_the_precision(tmp_path):
    from support.models import nf4_model

    model = nf4_model(tmp_path)
    assert get_preset("dpo", hardware="cpu", model=model).choices["precision"].value == "nf4"
    assert get_preset("lora", hardware="cpu", model=model).get_bnb_config().load_in_4bit
    for precision in ("int8", "bf16", "fp32"):
        with pytest.raises(ConflictError, match="already quantised as 'nf4'"):
            get_preset("qlora", hardware="cpu", model=model, precision=precision)
    with pytest.raises(ConflictError, match="Start from a model with 16-bit weights"):
        get_preset("lora", hardware="cpu", model=model, init_lora_weights="pissa")
    assert "quantization_config" not in get_preset("lora", hardware="cpu", model=model).model_kwargs()
    with pytest.raises(ConflictError, match="quantised as 'nf4' cannot be trained"):
        get_preset("sft", hardware="cpu", model=model)


def test_a_checkpoint_that_another_method_quantised(tiny_config):
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    preset = get_preset("lora", hardware="hopper", model=config)
    assert preset.get_bnb_config() is None
    with pytest.raises(ConflictError, match="quantised as 'gptq' cannot be trained"):
        get_preset("sft", hardware="hopper", model=config)
    with pytest.raises(ConflictError, match="already quantised as 'gptq'"):
        get_preset("qlora", hardware="hopper", model=config)
    with pytest.raises(ConflictError, match="init_lora_weights"):
        get_preset("lora", hardware="hopper", model=config, init_lora_weights="pissa")


def test_an_mxfp4_checkpoint_is_unpacked_for_training(tiny_config):
    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    kwargs = get_preset("lora", hardware="hopper", model=config).model_kwargs()
    assert kwargs["quantization_config"].dequantize
    with pytest.raises(ConflictError, match="already quantised as 'mxfp4'"):
        get_preset("qlora", hardware="hopper", model=config)


def test_int8_layers_are_checkpointed_by_the_kind_that_frees_them():
    """bitsandbytes keeps the inputs of its int8 layers where non-reentrant checkpointing does not look."""
    kinds = {
        precision: get_preset("qlora", hardware="ampere", precision=precision)
        .choices["activation_checkpointing_kwargs"]
        .value
        for precision in ("nf4", "fp4", "int8")
    }
    assert kinds == {"nf4": {"use_reentrant": False}, "fp4": {"use_reentrant": False}, "int8": {"use_reentrant": True}}
