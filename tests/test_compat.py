"""One contract test for each thing in forge.compat: a new release that moves it fails here, by name."""

from __future__ import annotations

import pytest
import torch
import transformers

from forge import compat
from support.families import tiny_model
from support.warnings import WarningRecorder


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_resolve_lora_targets_foresees_what_peft_does(family):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family)
    named = ("q_proj", "q_a_proj", "o_proj"), ("mlp.experts.down_proj",) if family != "llama" else ()
    resolved = compat.resolve_lora_targets(model, *named)
    with WarningRecorder():
        wrapped = get_peft_model(model, LoraConfig(target_modules=list(named[0]), target_parameters=list(named[1])))
    config = wrapped.peft_config["default"]
    assert resolved == (set(config.target_modules), set(config.target_parameters or ()))


def test_resolve_lora_targets_says_when_names_are_taken_for_experts():
    # All of peft >= 0.19 and transformers 5: `gate_proj` and `up_proj` would become one parameter of doubled rank, and
    # `gate_proj` alone is refused. Before, both are dense layers and nothing else.
    model = tiny_model("deepseek_v3")
    before = compat.resolve_lora_targets(tiny_model("llama"), ("gate_proj", "up_proj"), ())
    assert before == ({"gate_proj", "up_proj"}, set())
    try:
        from peft.utils import transformers_weight_conversion  # noqa: F401
    except ImportError:
        assert compat.resolve_lora_targets(model, ("gate_proj", "up_proj"), ()) == before
    else:
        assert compat.resolve_lora_targets(model, ("gate_proj", "up_proj"), ()) is None
        assert compat.resolve_lora_targets(model, ("gate_proj",), ()) is None
        assert compat.resolve_lora_targets(model, ("down_proj",), ()) == (set(), {"down_proj"})


@pytest.mark.parametrize("config_class", ["MambaConfig", "Mamba2Config", "FalconMambaConfig", "JambaConfig"])
def test_lora_can_adapt_agrees_with_peft(config_class):
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    mamba2 = {"head_dim": 8, "num_heads": 8, "expand": 2, "n_groups": 1} if config_class == "Mamba2Config" else {}
    jamba = {"num_key_value_heads": 2, "use_mamba_kernels": False} if config_class == "JambaConfig" else {}
    config = getattr(transformers, config_class)(**sizes, **mamba2, **jamba)
    model = transformers.AutoModelForCausalLM.from_config(config)
    name = next(name for name, _ in model.named_modules() if name.endswith("out_proj"))
    with WarningRecorder():
        if compat.lora_can_adapt(model, name):
            assert get_peft_model(model, LoraConfig(target_modules=["out_proj"])).get_base_model()
        else:
            with pytest.raises(ValueError, match="incompatible with Mamba"):
                get_peft_model(model, LoraConfig(target_modules=["out_proj"]))


def test_checkpointing_names_are_those_of_the_installed_arguments():
    from transformers import TrainingArguments

    for value in (True, False):
        kwargs = compat.checkpointing_names({"activation_checkpointing": value, "learning_rate": 1e-4})
        with WarningRecorder() as recorder:
            args = TrainingArguments(use_cpu=True, **kwargs)
        recorder.assert_clean()
        assert args.gradient_checkpointing is value  # the old name is readable in every version
        assert args.learning_rate == 1e-4


def test_dense_gguf_kwargs_are_known_to_the_installed_transformers(smollm2):
    """The conversion itself ran if the asset is there; its weights must be plain ones."""
    from safetensors import safe_open

    assert set(compat.dense_gguf_kwargs()) <= {"quantization_config"}
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype.itemsize for name in list(file.keys())[:20]} == {2}
        assert file.get_slice("model.layers.0.self_attn.q_proj.weight").get_shape() == [576, 576]


def test_what_the_callbacks_look_for_in_the_trainer():
    """Names that no documentation promises: src/forge/callbacks asks for them by name."""
    import inspect

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer
    from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

    for name in ("training_step", "evaluation_loop", "_save_checkpoint", "train"):
        assert callable(getattr(Trainer, name))
    assert "self.optimizer.eval()" in inspect.getsource(Trainer.evaluation_loop)
    assert "self.optimizer.train()" in inspect.getsource(Trainer.training_step)
    assert "cb.state()" in inspect.getsource(Trainer._save_checkpoint)
    assert list(inspect.signature(Accelerator.clip_grad_norm_).parameters)[1:3] == ["parameters", "max_norm"]
    assert {"eval", "train", "step_was_skipped"} <= set(vars(AcceleratedOptimizer))
    assert all(isinstance(kind, type) for kind in (ExportableState, PrinterCallback, ProgressCallback))


def test_what_bitsandbytes_would_pack_is_replaced_in_place():
    """The names that memory estimates lean on: replace_with_bnb_linear, HfQuantizer.get_modules_to_not_convert."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
            )
        )
    compat.replace_with_bitsandbytes(model, config)
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(packed) == 7
    assert "lm_head" not in packed


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_is_switched_on_with_its_kind(use_reentrant):
    model = tiny_model("llama")
    compat.enable_checkpointing(model, use_reentrant=use_reentrant)
    assert model.is_gradient_checkpointing
    from transformers import modeling_utils

    assert callable(modeling_utils.checkpoint)  # what a trace stands in for


@pytest.mark.parametrize("trainer", ["sft", "dpo", "reference"])
def test_the_head_that_trl_computes_its_loss_with(trainer):
    model = tiny_model("llama")
    compat.add_fused_head(model, trainer)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert model(input_ids=ids).logits.shape[:2] == (1, 4)  # without being asked it is the model's own forward
    try:
        from trl.trainer.utils import add_fused_lm_head  # noqa: F401
    except ImportError:
        return
    assert model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.shape == (1, 3)


def test_dropout_is_disabled_as_dpo_does():
    model = tiny_model("gpt2")
    assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    compat.disable_dropout(model)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_adapters_of_a_layer_are_taken_away():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0]
    compat.remove_adapters(layer)
    assert not [name for name, _ in layer.named_parameters() if "lora" in name]
    assert type(layer.self_attn.q_proj) is torch.nn.Linear


def test_the_training_template_that_trl_knows():
    from support.tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    assert compat.has_generation_markers(tokenizer.chat_template)
    assert compat.training_chat_template(tokenizer) is None  # it needs none
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert compat.training_chat_template(tokenizer) is None  # it knows none
    from trl import chat_template_utils

    tokenizer.chat_template = chat_template_utils.qwen3_chat_template
    assert not compat.has_generation_markers(tokenizer.chat_template)
    training = compat.training_chat_template(tokenizer)
    if hasattr(chat_template_utils, "has_generation_markers"):  # TRL 1.0's has no markers
        assert compat.has_generation_markers(training)
    else:
        assert training is None or compat.has_generation_markers(training)


@pytest.mark.parametrize("preference", [False, True])
def test_the_length_that_trl_cuts_to(preference):
    import trl

    from support.models import checkpointing

    config = trl.DPOConfig if preference else trl.SFTConfig
    made = config("out", use_cpu=True, bf16=False, **checkpointing(False))
    assert compat.default_max_length(preference) == made.max_length


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_rows_are_taken_in_order(kind, make_trainer):
    drawn, ordered = (make_trainer(kind, per_device_train_batch_size=1, rows=12) for _ in range(2))
    compat.train_in_order(ordered)
    taken = [batch["input_ids"][0].tolist() for batch in ordered.get_train_dataloader()]
    rows = [list(row["input_ids"]) for row in ordered.train_dataset]
    assert taken == rows
    assert [batch["input_ids"][0].tolist() for batch in drawn.get_train_dataloader()] != rows
