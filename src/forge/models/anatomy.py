"""One value that says all forge needs to know about a model, read from a live model, a config or an id."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ForgeError, UnsupportedError
from .experts import find_experts, is_linear
from .layers import (
    decoder_layers_path,
    name_in_layer,
    named_base_modules,
    refuse_other_architectures,
    text_attribute,
    unwrap,
)
from .targets import LoraTargets, find_targets

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelAnatomy:
    """What a model is made of; made by `read_anatomy`.

    Args:
        model_type: the config's `model_type`.
        name_or_path: the hub id or folder that it came from, None for a model built in code.
        num_parameters: of the whole model, towers included; tied ones once, 4-bit ones unpacked, adapters not.
        hidden_size: of the language decoder.
        num_hidden_layers: of the language decoder.
        vocab_size: rows of its embedding.
        max_position_embeddings: the longest context it is configured for, None where nothing bounds it.
        decoder_layers: dotted path of the decoder's list of layers.
        targets: what LoRA should adapt.
        routers: modules that choose between experts, relative to a decoder layer.
        tied_word_embeddings: whether lm_head and the input embeddings are one parameter.
        is_moe: whether it has experts.
        quantization: "nf4", "fp4", "int8", another method's name ("mxfp4", "gptq"), or None.
        linear_layers: names of all linear layers of the model, towers and lm_head included, "*" for a number.
        supports_sdpa: whether transformers has `scaled_dot_product_attention` for it.
        quantizable: whether bitsandbytes finds linear layers to pack in the decoder (or has packed them already).
    """

    model_type: str
    name_or_path: str | None
    num_parameters: int
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int | None
    decoder_layers: str
    targets: LoraTargets
    routers: tuple[str, ...]
    tied_word_embeddings: bool
    is_moe: bool
    quantization: str | None
    linear_layers: tuple[str, ...]
    supports_sdpa: bool
    quantizable: bool

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `from_dict` reads it back."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelAnatomy:
        """The anatomy that `to_dict` wrote."""
        known = {field.name: _frozen(values[field.name]) for field in fields(cls)}
        known["targets"] = LoraTargets(**{key: _frozen(value) for key, value in values["targets"].items()})
        return cls(**known)


def read_anatomy(
    model: PreTrainedModel | PeftModel | PreTrainedConfig | str | PathLike[str], **config_kwargs: Any
) -> ModelAnatomy:
    """Read a model's anatomy; from a config or an id, without its weights.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)
    >>> anatomy = read_anatomy(config)  # Llama-3-8B's shape
    >>> f"{anatomy.num_parameters / 1e9:.2f}B parameters, LoRA on {', '.join(anatomy.targets.target_modules)}"
    '8.03B parameters, LoRA on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj'

    Args:
        model: a live model (plain, quantised, on meta, or wrapped by PEFT), a config, a hub id or a local folder.
        **config_kwargs: for `AutoConfig.from_pretrained` (`revision`, `trust_remote_code`) with an id or a folder.

    Raises:
        UnsupportedError: for an encoder, an encoder-decoder model, one that transformers has no class for, and one in
            which LoRA finds nothing to adapt.
        ForgeError: for a folder that is not there, or holds an adapter.
    """
    from torch import nn
    from transformers import PreTrainedConfig

    if isinstance(model, (str, PathLike)):
        model = load_config(fspath(model), **config_kwargs)
    live = build_on_meta(model) if isinstance(model, PreTrainedConfig) else model
    if not isinstance(live, nn.Module) or not hasattr(unwrap(live), "config"):
        raise UnsupportedError(
            "forge reads the anatomy of a transformers model, a PeftModel, a config, a hub id or a local folder, "
            f"not of a {type(model).__name__}."
        )
    return _read(live, quantization_source=model)


def _read(model: nn.Module, *, quantization_source: Any) -> ModelAnatomy:
    base: Any = unwrap(model)
    config = base.config
    layers_path = decoder_layers_path(base)
    modules = named_base_modules(base)
    experts = find_experts(modules, layers_path)
    routers = dict.fromkeys(name_in_layer(name, layers_path) for name in sorted(experts.routers))
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    return ModelAnatomy(
        model_type=config.model_type,
        name_or_path=getattr(config, "name_or_path", None) or None,
        num_parameters=_count_parameters(modules.values()),
        hidden_size=int(text_attribute(config, "hidden_size") or embeddings.embedding_dim),
        num_hidden_layers=len(base.get_submodule(layers_path)),
        vocab_size=int(text_attribute(config, "vocab_size") or embeddings.num_embeddings),
        max_position_embeddings=text_attribute(config, "max_position_embeddings"),
        decoder_layers=layers_path,
        targets=find_targets(base, modules, layers_path, experts),
        routers=tuple(routers),
        tied_word_embeddings=head is not None and head.weight is embeddings.weight,
        is_moe=bool(experts.routers),
        quantization=quantization_of(getattr(quantization_source, "config", quantization_source)),
        linear_layers=tuple(dict.fromkeys(numberless(name) for name, module in modules.items() if is_linear(module))),
        supports_sdpa=bool(getattr(base, "_supports_sdpa", True)),
        quantizable=any(_packable(module) for name, module in modules.items() if name.startswith(f"{layers_path}.")),
    )


def _packable(module: nn.Module) -> bool:
    """Whether transformers' bitsandbytes integration replaces the layer: no subclass, such as Falcon's own."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return (
        type(module) is nn.Linear or isinstance(module, Conv1D) or type(module).__module__.startswith("bitsandbytes.")
    )


def numberless(name: str) -> str:
    """The name with "*" for every number in it, which is the same in all layers.

    >>> numberless("model.layers.11.mlp.experts.3.w1")
    'model.layers.*.mlp.experts.*.w1'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def load_config(name: str, **config_kwargs: Any) -> PreTrainedConfig:
    """The config of a hub id or a folder.

    Raises:
        ForgeError: for a folder that is not there, or holds an adapter.
    """
    from transformers import AutoConfig

    _refuse_other_folders(name)
    return AutoConfig.from_pretrained(name, **config_kwargs)


def _refuse_other_folders(name: str) -> None:
    """Refuse what `from_pretrained` would take for a hub id, or not know what to do with."""
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ForgeError(f"{folder} holds an adapter, not a model. Pass the model that it belongs to: {base!r}.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ForgeError(f"{folder} has no config.json. Pass the folder that save_pretrained wrote, or a hub id.")
    # A hub id is "name" or "owner/name".
    if not folder.exists() and (name.startswith(("/", "~", ".")) or len(folder.parts) > 2):
        raise ForgeError(f"There is no folder {folder}. Pass one that save_pretrained wrote, or a hub id.")


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """The model of a config, without memory for its weights.

    Raises:
        UnsupportedError: transformers has no causal or image-text-to-text model for it.
    """
    import torch
    import transformers

    refuse_other_architectures(config)
    config = copy.deepcopy(config)  # building a model writes into its config
    config._attn_implementation = "eager"  # the shapes are the same, and flash attention need not be installed
    by_name = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    by_task = [
        auto.from_config
        for auto, mapping in (
            (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING),
            (transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        )
        if type(config) in mapping
    ]
    build: Any = next((found for found in [*by_name, *by_task] if found is not None), None)
    if build is None:
        raise UnsupportedError(
            f"transformers has no causal or image-text-to-text model for {type(config).__name__} (model type "
            f"{config.model_type!r}, architectures {getattr(config, 'architectures', None)}). Pass the live model."
        )
    with torch.device("meta"):
        built = build(config)
        built.tie_weights()  # transformers 5.0 leaves it out on meta
    model: nn.Module = built
    return model


def _count_parameters(modules: Iterable[nn.Module]) -> int:
    unique = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    return sum(unpacked_numel(parameter) for parameter in unique.values())


_on_meta = build_on_meta


def unpacked_numel(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter; bitsandbytes packs two 4-bit ones into a byte, in any storage type."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    if (
        type(parameter).__name__ == "Params4bit" and parameter.shape[-1] == 1
    ):  # packed by a loader that set no state yet
        return parameter.numel() * parameter.element_size() * 2
    return parameter.numel()


def quantization_of(config: Any) -> str | None:
    """The format that a config says the weights are in: "nf4", "fp4", "int8", another method's name, or None."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, Mapping) else settings.to_dict()
    if values.get("load_in_4bit") or values.get("_load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    if values.get("load_in_8bit") or values.get("_load_in_8bit"):
        return "int8"
    method = values.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what they come back as from JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
