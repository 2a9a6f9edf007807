"""Every name and internal of transformers, TRL and PEFT that moved between the versions we admit, or that we lean on.

Nothing here is imported at the top: a function looks at what is installed when it is called. Each has a contract test
in tests/test_compat.py, so that a new release which moves something fails there, by name, and nowhere else.
"""

from __future__ import annotations

import re
from typing import Any


def dense_gguf_kwargs() -> dict[str, Any]:
    """What makes `from_pretrained(gguf_file=...)` return dense weights.

    Newer transformers keep a GGUF's weights packed unless `GgufConfig(dequantize=True)` is passed; older ones have no
    such class and always unpack.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def resolve_lora_targets(
    model: Any, target_modules: tuple[str, ...] | str, target_parameters: tuple[str, ...]
) -> tuple[str | set[str], set[str]] | None:
    """What PEFT makes of LoRA targets before it matches them, None when it refuses them or changes their rank.

    From 0.19 on, PEFT rewrites the configs of mixtures of experts whose modules transformers 5 fused, so that adapters
    trained before still load: `down_proj` becomes a parameter of the experts, and dense layers of that name are left
    out. Older versions take the names as they are.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return target_modules if isinstance(target_modules, str) else set(target_modules), set(target_parameters)
    from peft import LoraConfig

    modules = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(target_modules=modules, target_parameters=list(target_parameters))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:
        return None
    if config.rank_pattern or config.alpha_pattern:
        return None
    resolved = config.target_modules
    return resolved if isinstance(resolved, str) else set(resolved or ()), set(config.target_parameters or ())


def lora_can_adapt(model: Any, module_name: str) -> bool:
    """Whether PEFT accepts LoRA on a linear layer: not on Mamba's `out_proj`, whose kernel reads the weight itself."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return not (model_type in _MAMBA and module_name.rpartition(".")[2] == "out_proj")


# peft.tuners.tuners_utils._check_lora_target_modules_mamba holds the same list inside a function.
_MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def checkpointing_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`activation_checkpointing*` under the names that the installed version has.

    transformers renamed gradient_checkpointing in 5.x. Where both exist the new one must be passed, even as False:
    TRL's own default for the old one warns otherwise.
    """
    from dataclasses import fields

    from transformers import TrainingArguments

    if any(field.name == "activation_checkpointing" for field in fields(TrainingArguments)):
        return kwargs
    return {name.replace("activation_checkpointing", "gradient_checkpointing"): value for name, value in kwargs.items()}


def replace_with_bitsandbytes(model: Any, quantization_config: Any) -> None:
    """Replace in place the linear layers that `from_pretrained` would pack; what it leaves in 16 bits stays."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    kept = HfQuantizer.get_modules_to_not_convert(
        model, quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization_config)


def enable_checkpointing(model: Any, *, use_reentrant: bool) -> None:
    """`activation_checkpointing_enable`, or what it was called before."""
    kwargs = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def add_fused_head(model: Any, trainer: str) -> None:
    """Give the model the LM head that TRL's trainer ("sft", "dpo", or "reference" for DPO's) computes its loss with.

    TRL 1.0 has none: its trainers read whole logits.
    """
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return
    outputs = {
        "sft": ("log_probs", "entropy", "is_top1"),
        "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
        "reference": ("log_probs",),
    }
    add_fused_lm_head(model, outputs=outputs[trainer])


def disable_dropout(model: Any) -> None:
    """What DPOTrainer does to a model unless it is told otherwise."""
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(model)


def remove_adapters(module: Any) -> list[tuple[str, Any]]:
    """Take the adapters of all PEFT layers inside a module away, and leave the layers that they wrapped.

    Returns:
        What was taken, by its dotted name in the module; `setattr` on its parent puts it back.
    """
    removed = []
    for name, child in list(module.named_children()):
        wrapped = wrapped_by_adapter(child)
        if wrapped is None:
            removed += [(f"{name}.{inner}", found) for inner, found in remove_adapters(child)]
        else:
            setattr(module, name, wrapped)
            removed.append((name, child))
    return removed


def wrapped_by_adapter(module: Any) -> Any:
    """The layer that a PEFT layer stands in for, or the module that one of `modules_to_save` does; else None."""
    get_base_layer = getattr(module, "get_base_layer", None)
    if callable(get_base_layer):
        return get_base_layer()
    return getattr(module, "original_module", None) if hasattr(module, "_active_adapter") else None


def without_wrappers(name: str) -> str:
    """The name that a parameter had before PEFT wrapped its module.

    >>> without_wrappers("mlp.experts.base_layer.base_layer.gate_up_proj")
    'mlp.experts.gate_up_proj'
    """
    return name.replace(".base_layer", "").replace(".original_module", "")


def training_chat_template(tokenizer: Any) -> str | None:
    """TRL's rewriting of a chat template that it knows, with `{% generation %}` markers around answers; else None.

    TRL 1.0 knows Qwen3's alone, later versions most families'. For templates that it does not know it raises, and for
    those that need no rewriting it returns None; the one of TRL 1.0 need not have markers.
    """
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, KeyError, AttributeError, TemplateError):
        return None
    return template if template is not None and has_generation_markers(template) else None


def has_generation_markers(chat_template: str) -> bool:
    """Whether a template says which of its output is the assistant's; TRL's function of that name is younger than 1.0.

    >>> has_generation_markers("{%- generation -%}{{ message.content }}{%- endgeneration -%}")
    True
    """
    return re.search(r"\{%-?\s*generation\s*-?%\}", chat_template) is not None


def default_max_length(preference: bool) -> int | None:
    """The length to which SFTConfig, or DPOConfig, cuts unless it is told otherwise."""
    import trl

    config = trl.DPOConfig if preference else trl.SFTConfig
    default: int | None = config.__dataclass_fields__["max_length"].default
    return default


def train_in_order(trainer: Any) -> None:
    """Let a trainer take its training rows in the order that they have; transformers 5.0 has no argument for it."""
    from torch.utils.data import SequentialSampler

    if hasattr(trainer.args, "train_sampling_strategy"):
        trainer.args.train_sampling_strategy = "sequential"
    else:
        trainer._get_train_sampler = lambda dataset=None: SequentialSampler(
            trainer.train_dataset if dataset is None else dataset
        )
