"""The formulas behind the trace, for models whose step cannot be traced; their band is wider.

Counted from the shapes of the linear layers rather than from a model's name:

- weights: their stored bytes; packed to 4 bits 0.5 bytes and one scale per 64 (QLoRA, arXiv:2305.14314, section 3).
- gradients, optimizer: by what trains; AdamW keeps two fp32 moments.
- activations of a layer: what goes in and comes out of each linear layer, in the width of the autocast, plus norms and
  the residual stream (8 hidden states); with eager attention two score matrices per head (Korthikanti et al. 2022,
  arXiv:2205.05198, section 4, without its dropout masks). With checkpointing the layers' inputs, and one layer whole.
- frozen layers: their weights, nothing else; and not those either where a full prefix cache has let them leave the GPU.
  What the cache brings is a hidden state.
- under autocast, fp32 weights that train: a 16-bit copy of each until forward ends (torch's autocast cache).
- loss: plain trainers hold the logits three times (16 bit, fp32, gradient); TRL's fused head a tile of 4,096 tokens.
- reserved: 6% on top.

How far all that is from the trace: benchmarks/memory_formulas.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..models import decoder_layers
from ..models.experts import is_linear
from ..models.layers import base_modules_below, text_attribute, unwrap
from .describe import Described
from .part import PARTS

if TYPE_CHECKING:
    from torch import nn

    from .scenario import Scenario

_STATE_BYTES = {"adafactor": 0.01, "sgd": 0.0}  # per parameter; 8 for AdamW in fp32, 2 in 8 bits
_HIDDEN_STATES = 8
_TILE = (4096, 32768)
_RESERVED = 1.06


def formulas(run: Described) -> tuple[dict[str, int], int, int, str]:
    """Parts in bytes, reserved bytes, paged bytes, and the phase of the peak."""
    scenario, base = run.scenario, unwrap(run.source)
    counts = _Counts(run.source, scenario)
    width = 2 if scenario.autocast else 4
    tokens = scenario.rows * scenario.sequence_length
    layers = list(decoder_layers(run.source))
    per_layer = [_layer_bytes(layer, scenario, base, tokens, width) for layer in layers[scenario.frozen_layers :]]
    hidden = int(text_attribute(base.config, "hidden_size")) * tokens * width
    casts = _cast_bytes(run.source, scenario)
    kept = casts + sum(per_layer) if scenario.checkpointing == "off" else casts + hidden * len(per_layer)
    kept += hidden * scenario.prefix_cache
    logits = _logits_bytes(base, scenario, tokens)
    state, paged = _state_bytes(scenario.optim, counts.trainable, on_gpu=scenario.device == "cuda")
    shadow = 4 * counts.trainable if scenario.ema == "device" else 0
    parts: dict[str, int] = dict.fromkeys(map(str, PARTS), 0) | {
        "parameters": counts.weight_bytes,
        "gradients": counts.gradient_bytes,
        "optimizer": state + shadow,
        "activations": kept,
        "logits": logits,
        "quantization": counts.scale_bytes,
        "reference_model": counts.weight_bytes if scenario.reference == "copy" else 0,
    }
    at_loss, largest = kept + logits, max(per_layer, default=0)
    if scenario.checkpointing != "off":  # or a little later: the uppermost layer is computed again, the rest waits
        at_loss = max(at_loss, hidden * len(per_layer) + largest)
    waiting = counts.gradient_bytes if scenario.accumulation > 1 else 0  # of the micro-batches before
    if at_loss + waiting >= largest + counts.gradient_bytes:
        phase = "loss"
        parts |= {"activations": at_loss - min(logits, at_loss), "gradients": waiting}
    else:
        phase = "backward"
        parts |= {"activations": largest, "logits": 0}
    return parts, int(_RESERVED * sum(parts.values())), paged, phase


class _Counts:
    """Numbers of parameters and their bytes, as they are stored and as they train."""

    def __init__(self, source: Any, scenario: Scenario) -> None:
        width = {"float32": 4, None: 0}.get(scenario.dtype, 2)
        packable = _packable(source) if scenario.quantization is not None else set()
        bits = 4 if scenario.quantization is not None and scenario.quantization.load_in_4bit else 8
        self.weight_bytes = self.scale_bytes = self.gradient_bytes = self.trainable = 0
        adapters = scenario.peft_config is not None
        frozen, prefix = _frozen(source, scenario)
        for parameter in source.parameters():
            count = parameter.numel()
            if scenario.offload_prefix and id(parameter) in prefix:
                continue
            if id(parameter) in packable:
                self.weight_bytes += count * bits // 8
                self.scale_bytes += (
                    count // 64 * (1 if getattr(scenario.quantization, "bnb_4bit_use_double_quant", 0) else 4)
                )
            else:
                self.weight_bytes += count * (width or parameter.element_size())
            trains = parameter.requires_grad and id(parameter) not in frozen
            if trains and not adapters and scenario.quantization is None:
                self._trains(count, 4 if scenario.fp32_trainable else width or parameter.element_size())
        if adapters:
            added = _adapter_parameters(source, scenario)
            self.weight_bytes += 4 * added
            self._trains(added, 4)

    def _trains(self, count: int, width: int) -> None:
        self.trainable += count
        self.gradient_bytes += width * count


def _frozen(source: Any, scenario: Scenario) -> tuple[set[int], set[int]]:
    """The parameters that freezing keeps from training, and those of them that are in the layers."""
    layers = list(decoder_layers(source))[: scenario.frozen_layers]
    prefix = {id(parameter) for layer in layers for parameter in layer.parameters()}
    base: Any = unwrap(source)
    before = base.get_input_embeddings().parameters() if layers else ()
    return prefix | {id(parameter) for parameter in before}, prefix


def _packable(source: Any) -> set[int]:
    base: Any = unwrap(source)
    head = base.get_output_embeddings()
    return {id(m.weight) for m in base.modules() if is_linear(m) and m is not head}


def _adapter_parameters(source: Any, scenario: Scenario) -> int:
    """LoRA's, r (in + out) for each adapted linear layer of the layers that train; a guess for other adapters."""
    rank = int(getattr(scenario.peft_config, "r", 8) or 8)
    layers = list(decoder_layers(source))[scenario.frozen_layers :]
    return sum(rank * sum(_sides(m)) for layer in layers for m in base_modules_below(layer) if is_linear(m))


def _sides(linear: Any) -> tuple[int, int]:
    features = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    return features if None not in features else tuple(linear.weight.shape)


def _layer_bytes(layer: nn.Module, scenario: Scenario, base: Any, tokens: int, width: int) -> int:
    hidden = int(text_attribute(base.config, "hidden_size"))
    through = sum(sum(_sides(m)) for m in base_modules_below(layer) if is_linear(m))
    chosen = int(text_attribute(base.config, "num_experts_per_tok") or 1)
    through += chosen * sum(a + b for _, a, b in _expert_sides(layer))
    found = tokens * width * (through + _HIDDEN_STATES * hidden)
    if scenario.peft_config is not None:  # PEFT adds an adapter of experts to the whole stack, as one matrix each
        found += 2 * width * sum(count * a * b for count, a, b in _expert_sides(layer))
    if scenario.attention == "eager":
        heads = int(text_attribute(base.config, "num_attention_heads") or 1)
        found += 2 * scenario.rows * heads * scenario.sequence_length**2 * width
    return found


def _expert_sides(layer: nn.Module) -> list[tuple[int, int, int]]:
    """Experts, inputs and outputs of each fused stack of a layer."""
    return [tuple(p.shape) for p in layer.parameters() if p.dim() == 3]  # type: ignore[misc]


def _cast_bytes(source: Any, scenario: Scenario) -> int:
    """Autocast keeps a 16-bit copy of every fp32 weight that trains until forward ends."""
    if scenario.autocast is None or scenario.peft_config is not None or scenario.dtype not in (None, "float32"):
        return 0
    frozen, _ = _frozen(source, scenario)
    trained = (p for p in source.parameters() if p.requires_grad and id(p) not in frozen)
    return 2 * sum(int(p.numel()) for p in trained if p.dim() > 1)


def _logits_bytes(base: Any, scenario: Scenario, tokens: int) -> int:
    vocabulary = int(text_attribute(base.config, "vocab_size"))
    if scenario.trainer == "plain":
        return tokens * vocabulary * (2 + 4 + 4)
    hidden = int(text_attribute(base.config, "hidden_size"))
    return min(tokens, _TILE[0]) * min(vocabulary, _TILE[1]) * 2 + tokens * hidden * 4


def _state_bytes(optim: str, trainable: int, *, on_gpu: bool) -> tuple[int, int]:
    per_parameter = _STATE_BYTES.get(optim, 2.0 if "8bit" in optim else 8.0)
    total = math.ceil(per_parameter * trainable)
    return (0, total) if optim.startswith("paged") and on_gpu else (total, 0)
