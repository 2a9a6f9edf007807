"""What a model is made of: counts, dtypes, packed layers, ties and GiB, by part; nothing is copied, read or moved.

- A parameter counts as the weights that it stands for: a tied one once, a 4-bit one unpacked, an adapter's apart.
- Memory counts what is stored: parameters, buffers and quantisation constants, what shares a storage once. bitsandbytes
  keeps its constants in Python attributes, where transformers' `get_memory_footprint` does not see them.
- All numbers are sums over one list of pieces (`pieces.py`, `parts.py`), so they agree.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ...models.anatomy import build_on_meta, load_config, quantization_of
from ...models.layers import decoder_layers_path, text_attribute, unwrap
from .parts import Part, Quantized, grouped, parts_of, quantized_in, unquantized_in
from .pieces import ADAPTERS, Pieces, adapter_configs, dtype_name
from .table import breakdown, summary

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelInfo:
    """What `print_model_info` prints, as a value.

    Args:
        name: the hub id or folder that the model came from, else its class.
        model_class: the class of the model without adapters.
        devices: where its parameters are.
        num_parameters: of the model without adapters; tied ones once, 4-bit ones unpacked.
        adapter_parameters: of all adapters, copies by `modules_to_save` included.
        trainable_parameters: those that require a gradient, in the model and its adapters.
        dtypes: parameters and their bytes by dtype, adapters included; "nf4" for packed ones.
        quantized: the packed layers, by method.
        unquantized: linear layers and fused experts that are not packed in a model where others are, "*" for a number.
        num_layers: how many decoder layers; None where they were not found.
        layers_path: where they are.
        layers_missing: why they were not found.
        tied: groups of names that are one parameter.
        adapters: a description of each.
        num_buffers: how many buffers.
        parameter_bytes: as stored: packed ones packed.
        buffer_bytes: of the buffers.
        constant_bytes: of the quantisation constants.
        parts: the whole by part; those with an empty `inside` sum to it.
        notes: what to know when reading the numbers.
    """

    name: str
    model_class: str
    devices: tuple[str, ...]
    num_parameters: int
    adapter_parameters: int
    trainable_parameters: int
    dtypes: tuple[Part, ...]
    quantized: tuple[Quantized, ...]
    unquantized: tuple[str, ...]
    num_layers: int | None
    layers_path: str | None
    layers_missing: str | None
    tied: tuple[tuple[str, ...], ...]
    adapters: tuple[str, ...]
    num_buffers: int
    parameter_bytes: int
    buffer_bytes: int
    constant_bytes: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...]

    @property
    def frozen_parameters(self) -> int:
        """Those that require no gradient, in the model and its adapters."""
        return self.num_parameters + self.adapter_parameters - self.trainable_parameters

    @property
    def trainable_share(self) -> float:
        """Between 0 and 1, of the model and its adapters."""
        return self.trainable_parameters / max(1, self.num_parameters + self.adapter_parameters)

    @property
    def memory_bytes(self) -> int:
        """Parameters, buffers and quantisation constants; no gradients, optimizer states or activations."""
        return self.parameter_bytes + self.buffer_bytes + self.constant_bytes

    @property
    def memory_gb(self) -> float:
        """`memory_bytes` in GiB (2**30 bytes)."""
        return self.memory_bytes / 2**30

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold, the properties included."""
        derived = ("frozen_parameters", "trainable_share", "memory_bytes", "memory_gb")
        values: dict[str, Any] = _plain(asdict(self))
        return {**values, **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        return f"{summary(self)}\n\n{breakdown(self)}"


def print_model_info(
    model: nn.Module | PreTrainedModel | PeftModel | PreTrainedConfig | str | PathLike[str], show_breakdown: bool = True
) -> ModelInfo:
    """Print what a model is made of: parameters, dtypes, quantised layers, ties, memory, and all of it by part.

    Nothing is copied, moved, read from a device or changed. The memory is that of the model alone; gradients, optimizer
    and activations come on top.

    >>> from transformers import LlamaConfig
    >>> llama = LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, dtype="bfloat16")
    >>> info = print_model_info(llama, show_breakdown=False)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    model         LlamaForCausalLM
    parameters    8,030,261,248 (8.03B)
    ...
    >>> f"{info.num_layers} layers, {info.memory_gb:.2f} GiB"
    '32 layers, 14.96 GiB'

    Args:
        model: a live model (plain, quantised by bitsandbytes, on meta, or wrapped by PEFT); or a config, a hub id or
            a local folder, whose model is built without weights, in the config's dtype.
        show_breakdown: also print a table by part: embeddings, decoder layers (attention, mlp, experts, router,
            norms), head, towers, adapters.

    Returns:
        The same as a value; `info.parts` holds the breakdown in any case. GB are GiB (2**30 bytes).

    Raises:
        UnsupportedError: for what is no model, and for a config that transformers has no model class for.
        ForgeError: for a folder that is not there, or holds an adapter.
    """
    from torch import nn
    from transformers import PreTrainedConfig

    source: Any = model
    if isinstance(source, (str, PathLike)):
        source = load_config(fspath(source))
    if isinstance(source, PreTrainedConfig):
        live, notes = _from_config(source)
    elif isinstance(source, nn.Module):
        live, notes = _without_engine(source), []
    else:
        raise UnsupportedError(
            "print_model_info takes a model, a PeftModel, a config, a hub id or a local folder, not "
            + (f"the class {source.__name__}. Build it first." if isinstance(source, type) else _not_a_model(source))
        )
    info = _read(live, notes)
    summary(info).print()
    if show_breakdown:
        breakdown(info, title=" ").print()
    return info


def _not_a_model(value: Any) -> str:
    from torch import nn

    held = " Pass its .model." if isinstance(getattr(value, "model", None), nn.Module) else ""
    return f"a {type(value).__name__}.{held}"


def _without_engine(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and (distributed) data parallelism."""
    from torch import nn

    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner: Any = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _from_config(config: PreTrainedConfig) -> tuple[nn.Module, list[str]]:
    """The model of a config on meta, parameters in the dtype in which `from_pretrained` would load them."""
    import torch

    try:
        built = build_on_meta(config)
    except UnsupportedError as unsupported:
        built = _any_on_meta(config, unsupported)
    named = getattr(config, "dtype", None) or text_attribute(config, "dtype")
    dtype = getattr(torch, named) if isinstance(named, str) else named or torch.float32
    kept = "|".join(map(re.escape, getattr(built, "_keep_in_fp32_modules_strict", None) or ()))
    for name, parameter in built.named_parameters():
        if parameter.is_floating_point():
            keep = kept and re.search(rf"(?:^|\.)(?:{kept})(?:\.|$)", name)
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    label = f"its dtype {dtype_name(dtype)}" if named else f"{dtype_name(dtype)} because it names no dtype"
    return built, [f"built from the config in {label}; no weights loaded, memory is what they would take"]


def _any_on_meta(config: PreTrainedConfig, unsupported: UnsupportedError) -> nn.Module:
    """The model of a config that forge does not fine-tune: an encoder, for instance."""
    import torch
    import transformers

    config = copy.deepcopy(config)  # building a model writes into its config
    names = getattr(config, "architectures", None) or ()
    build = next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)
    try:
        with torch.device("meta"):
            built: Any = transformers.AutoModel.from_config(config) if build is None else build(config)
    except ValueError:  # no class at all
        raise unsupported from None
    built.tie_weights()
    model: nn.Module = built
    return model


def _read(model: nn.Module, notes: Iterable[str] = ()) -> ModelInfo:
    base = unwrap(model)
    config: Any = getattr(base, "config", None)
    layers_path, missing = _layers_path(base)
    layers: Any = () if layers_path is None else base.get_submodule(layers_path)
    pieces = Pieces(model, layers_path)
    parameters = [piece for piece in pieces.all if piece.kind == "parameter"]
    buffers = [piece for piece in pieces.all if piece.kind == "buffer"]
    constants = [piece for piece in pieces.all if piece.kind not in ("parameter", "buffer")]
    quantized = quantized_in(parameters, constants)
    devices = tuple(sorted({piece.device for piece in parameters}))
    return ModelInfo(
        name=getattr(config, "name_or_path", None) or type(base).__name__,
        model_class=type(base).__name__,
        devices=devices,
        num_parameters=sum(piece.count for piece in parameters if piece.part != ADAPTERS),
        adapter_parameters=sum(piece.count for piece in parameters if piece.part == ADAPTERS),
        trainable_parameters=sum(piece.count for piece in parameters if piece.trainable),
        dtypes=grouped(parameters, lambda piece: piece.dtype),
        quantized=quantized,
        unquantized=unquantized_in(pieces, parameters) if quantized else (),
        num_layers=None if layers_path is None else len(layers),
        layers_path=layers_path,
        layers_missing=missing,
        tied=pieces.tied,
        adapters=_adapters(model),
        num_buffers=len(buffers),
        parameter_bytes=sum(piece.bytes for piece in parameters),
        buffer_bytes=sum(piece.bytes for piece in buffers),
        constant_bytes=sum(piece.bytes for piece in constants),
        parts=parts_of(pieces),
        notes=(*notes, *_notes(config, pieces, quantized, devices if not notes else ())),
    )


def _layers_path(base: nn.Module) -> tuple[str | None, str | None]:
    """Where the decoder layers are, or why they were not found: the reason without the advice on LoRA."""
    try:
        return decoder_layers_path(base), None
    except UnsupportedError as reason:
        return None, str(reason).partition(". ")[0]


def _adapters(model: nn.Module) -> tuple[str, ...]:
    configs = adapter_configs(model)
    active: Any = getattr(model, "active_adapters", ()) if configs else ()
    active = active() if callable(active) else active  # a property of PeftModel, a method in transformers
    found = []
    for name, config in configs.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type)).replace("LORA", "LoRA")
        rank = f", r={config.r}" if getattr(config, "r", None) else ""
        dora = ", DoRA" if getattr(config, "use_dora", False) else ""
        found.append(f"{name}: {kind}{rank}{dora}{'' if name in active else ', not active'}")
    return tuple(found)


def _notes(config: Any, pieces: Pieces, quantized: tuple[Quantized, ...], devices: tuple[str, ...]) -> Iterable[str]:
    if devices == ("meta",):
        yield "on meta: no weights loaded, memory is what they would take"
    method = quantization_of(config)
    if method is not None and not quantized:
        yield f"the config says {method}, but bitsandbytes packed no layer here: counted as it stands, unpacked"
    if getattr(config, "tie_word_embeddings", False) and pieces.has_own_head:
        yield "the config ties the head to the embeddings, but here they are two parameters"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
