"""What a few batches tell about each decoder layer: the gradients that reach it, and how much it changes what passes.

Nothing of the model is different afterwards, an exception in the middle included. The choices made:

- Everything runs as in evaluation, so no dropout blurs the numbers. The modules' flags are set one by one, since
  `model.eval()` would also run whatever a module does beside that.
- In evaluation no model checkpoints, and without checkpointing the trainer's batches may not fit. So the probe
  checkpoints each layer itself, by an instance's `forward`; the hooks stay outside and see each layer once.
- A gradient is measured when it arrives and dropped at once: one parameter's gradient is in memory, never all of them.
- Hooks that are on the parameters already do not run meanwhile: layer-wise optimizers step in such hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ForgeError, NonFiniteError, UnsupportedError
from ..models.layers import decoder_layers, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST_BATCHES = 256
_FP16_LOSS_SCALE = 2.0**10  # else the smallest gradients are zero in half precision


@dataclass(frozen=True)
class Probed:
    """The measurements, by batch and layer.

    Args:
        absolute: the sum of the absolute values of each layer's gradient; None where nothing in the layers trains.
        squared: the sum of their squares; None likewise.
        importance: 1 - cosine similarity of each layer's input and output, averaged over the batch's real tokens.
        trains: whether anything in a layer does; nothing of a quantised model without adapters, which no trainer takes.
        tokens: real ones, of all batches.
        row_length: tokens in a row, padding included, averaged over the batches.
    """

    absolute: list[list[float]] | None
    squared: list[list[float]] | None
    importance: list[list[float]]
    trains: tuple[bool, ...]
    tokens: int
    row_length: int


def probe(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Probed:
    """Run forward and backward on every batch.

    Raises:
        ForgeError: no batches, or one that is none or supervises nothing; found before anything is run.
        NonFiniteError: a loss or a gradient is NaN or infinite.
        UnsupportedError: not a causal language model with its weights in memory.
    """
    _refuse_other_objects(model)
    layers: list[Any] = list(decoder_layers(model))
    with _random_numbers_kept(model):  # a loader draws some when it begins
        ready = _read(batches)
        trains = tuple(_can_train(model) and any(p.requires_grad for p in layer.parameters()) for layer in layers)
        found = [_measure(model, layers, batch, index, backward=any(trains)) for index, batch in enumerate(ready)]
    return Probed(
        absolute=[sums for sums, _, _ in found] if any(trains) else None,
        squared=[squares for _, squares, _ in found] if any(trains) else None,
        importance=[changes for _, _, changes in found],
        trains=trains,
        tokens=sum(int(_real_tokens(batch).sum()) for batch in ready),
        row_length=round(sum(batch["input_ids"].shape[1] for batch in ready) / len(ready)),
    )


def _measure(
    model: Any, layers: list[Any], batch: dict[str, Any], index: int, *, backward: bool
) -> tuple[list[float], list[float], list[float]]:
    """Per layer the gradient's absolute values and squares, each summed, and the importance."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    gradients: list[tuple[int, Tensor]] = []
    changes: list[list[Tensor]] = [[] for _ in layers]
    dtype, scale = _precision(model)
    with ExitStack() as stack:
        stack.enter_context(_evaluation(model))
        stack.enter_context(_observed(layers, _real_tokens(inputs), changes))
        stack.enter_context(torch.set_grad_enabled(backward))
        if backward:
            stack.enter_context(_checkpointed(layers))
            stack.enter_context(_gradients_taken(model, layers, gradients))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = getattr(model(**inputs | {"use_cache": False}), "loss", None)
        if loss is None:
            raise UnsupportedError(
                f"{type(unwrap(model)).__name__} returned no loss for labels: the probe needs a causal language model "
                "with its head. Load it with AutoModelForCausalLM."
            )
        _refuse_non_finite(loss.item(), f"the loss of batch {index}")
        if loss.requires_grad:  # else nothing that is active trains, which is told by the gradients that are missing
            (loss * scale).backward()
    silent = [position for position, seen in enumerate(changes) if not seen]
    if silent:
        raise UnsupportedError(
            f"Decoder layer {silent[0]} was not run: something answers in its place (a PrefixCache?). Take that away "
            "for the probe."
        )
    absolute, squared = _by_layer(gradients, len(layers), scale)
    for position, value in enumerate(squared):
        _refuse_non_finite(value, f"the gradient of decoder layer {position} on batch {index}")
    return absolute, squared, [torch.stack(seen).mean().item() for seen in changes]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _checkpointed(layers: list[Any]) -> Iterator[None]:
    """Recompute each layer in backward."""
    from torch.utils.checkpoint import checkpoint

    before = {layer: vars(layer).get("forward") for layer in layers}
    try:
        for layer in before:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in before.items():
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


@contextmanager
def _observed(layers: list[Any], real: Tensor, changes: list[list[Tensor]]) -> Iterator[None]:
    """Note how much each layer changes what passes through it."""

    def observer(seen: list[Tensor]) -> Callable[..., None]:
        @torch.no_grad()
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, (tuple, list)) else output
            seen.append(_change(before, after, real))

        return hook

    handles: list[Any] = []
    try:
        for layer, seen in zip(layers, changes, strict=True):
            handles.append(layer.register_forward_hook(observer(seen), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """1 - cosine similarity, averaged over the real tokens."""
    similar = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    try:
        counted = real.to(similar.device).expand(similar.shape)
    except RuntimeError as error:
        raise UnsupportedError(
            f"A decoder layer works on {tuple(similar.shape)} tokens, and the batch has {tuple(real.shape)}: what is "
            "inserted (a learnt prompt) cannot be told from what is read. Probe the model without it."
        ) from error
    return (1 - similar[counted]).mean()


@contextmanager
def _gradients_taken(model: nn.Module, layers: list[Any], found: list[tuple[int, Tensor]]) -> Iterator[None]:
    """Measure and drop every gradient that arrives; gradients and hooks that were there come back."""
    owner = {p: index for index in reversed(range(len(layers))) for p in layers[index].parameters()}
    trained: list[Any] = [p for p in model.parameters() if p.requires_grad]
    before = [(p, p.grad, p._post_accumulate_grad_hooks) for p in trained]

    def take(parameter: Any) -> None:
        if parameter in owner:
            norms = [torch.linalg.vector_norm(parameter.grad, order, dtype=torch.float32) for order in (1, 2)]
            found.append((owner[parameter], torch.stack(norms)))
        parameter.grad = None

    handles: list[Any] = []
    try:
        for parameter in trained:
            parameter.grad = parameter._post_accumulate_grad_hooks = None
            handles.append(parameter.register_post_accumulate_grad_hook(take))
        yield
    finally:
        for handle in handles:  # autograd would run a hook that is only out of sight
            handle.remove()
        for parameter, gradient, hooks in before:
            parameter.grad, parameter._post_accumulate_grad_hooks = gradient, hooks


def _by_layer(gradients: list[tuple[int, Tensor]], depth: int, scale: float) -> tuple[list[float], list[float]]:
    """Sums of absolute values and of squares; squared and added in double precision."""
    absolute, squared = [0.0] * depth, [0.0] * depth
    on_device: dict[Any, list[tuple[int, Tensor]]] = {}
    for index, norms in gradients:
        on_device.setdefault(norms.device, []).append((index, norms))
    for group in on_device.values():  # one read for each device
        for (index, _), (first, second) in zip(group, torch.stack([n for _, n in group]).tolist(), strict=True):
            absolute[index] += first / scale
            squared[index] += (second / scale) ** 2
    return absolute, squared


def _can_train(model: Any) -> bool:
    """Not if it is quantised and has no adapters: then only its norms say that they train, and Trainer refuses it."""
    base: Any = unwrap(model)
    adapted = hasattr(model, "peft_config") or getattr(base, "_hf_peft_config_loaded", False)
    trainable = getattr(getattr(base, "hf_quantizer", None), "is_qat_trainable", False)
    return bool(adapted or trainable or not getattr(base, "is_quantized", False))


def _precision(model: nn.Module) -> tuple[torch.dtype | None, float]:
    """Autocast's dtype, of a model that mixes one half precision with fp32 as trainers do; and the loss scale."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    halves = dtypes & {torch.bfloat16, torch.float16}
    mixed = len(halves) == 1 and torch.float32 in dtypes
    return next(iter(halves)) if mixed else None, _FP16_LOSS_SCALE if torch.float16 in dtypes else 1.0


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """The CPU's, and those of the devices that the model is on."""
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=list(devices), device_type=kind):
        yield


def _real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """True for each token that is no padding; all of them where no mask of the rows says so."""
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return mask != 0 if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)


def _read(batches: Any) -> list[dict[str, Any]]:
    """All batches, checked, with labels."""
    if isinstance(batches, Mapping) or not hasattr(batches, "__iter__"):
        raise ForgeError(
            f"batches is one {type(batches).__name__}: it must be an iterable of batches, such as "
            "islice(trainer.get_train_dataloader(), 8), or [batch]."
        )
    found = list(islice(batches, MOST_BATCHES + 1))
    if not found:
        raise ForgeError("batches is empty: the probe needs one at least, and two to know its noise. Eight are usual.")
    if len(found) > MOST_BATCHES:
        raise ForgeError(
            f"batches has more than {MOST_BATCHES} batches, and the probe is meant to be short. Pass a few of them: "
            "islice(trainer.get_train_dataloader(), 8)."
        )
    return [_checked(batch, f"batch {index}") for index, batch in enumerate(found)]


def _checked(batch: Any, name: str) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise ForgeError(f"{name} is a {type(batch).__name__}: it must be a dict of tensors, as a collator makes them.")
    foreign = [key for key, value in batch.items() if not isinstance(value, (torch.Tensor, int, float, type(None)))]
    if foreign:
        raise ForgeError(
            f"{name} holds a {type(batch[foreign[0]]).__name__} in {foreign[0]!r}: it must be a dict of tensors, as a "
            'collator makes them (return_tensors="pt").'
        )
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2:
        shape = "no input_ids" if ids is None else f"input_ids of shape {tuple(ids.shape)}"
        raise ForgeError(
            f"{name} has {shape} (keys: {', '.join(map(str, batch))}): the probe needs input_ids of shape "
            "(rows, tokens), as the collators of Trainer and SFTTrainer make them."
        )
    checked = {key: value for key, value in batch.items() if value is not None}
    if "labels" not in checked:
        if "completion_mask" in checked:
            raise ForgeError(
                f"{name} has a completion_mask and no labels, as DPOTrainer's batches do: the probe measures the loss "
                "of language modelling. Pass batches with labels, such as an SFTTrainer's of the chosen answers."
            )
        checked["labels"] = ids.masked_fill(~_real_tokens(checked), -100)
    if not (checked["labels"][..., 1:] != -100).any():
        raise ForgeError(
            f"{name} supervises no token: all its labels are -100, so its loss is undefined. Leave it out, or look at "
            "the mask of the answers (a chat template without generation markers leaves none)."
        )
    return checked


def _refuse_non_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{what[0].upper()}{what[1:]} is {value}: nothing can be measured with it. Look for a broken row in the "
            "data, NaN among the weights (MonitorCallback names them), or fp16 that overflows (load in bfloat16)."
        )


def _refuse_other_objects(model: Any) -> None:
    if not isinstance(model, torch.nn.Module) or not hasattr(unwrap(model), "config"):
        raise UnsupportedError(
            f"suggest_freeze_ratio runs a transformers model or a PeftModel, not a {type(model).__name__}. Load the "
            "model first, and probe it before anything wraps it (trainer.model before trainer.train())."
        )
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedError(
            f"{type(unwrap(model)).__name__} has weights on the meta device, that is none: the probe runs it. Load the "
            "weights, all of them on devices (no offloading)."
        )
