"""Two steps of the scenario's trainer on a skeleton, on tape.

The loss is the installed trainer's own `compute_loss`, called on an instance that was never initialised: it holds the
arguments and a stand-in for the accelerator, and no more. (Initialising one would seed the caller's random numbers and
set accelerate's state for the whole process.)
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import nn

from ... import compat
from ...errors import ConflictError
from ...models.layers import decoder_layers, unwrap
from ..scenario import Scenario
from .cuda import CudaWays, in_backward, recomputed_alike, triton_tiles
from .optimizers import Optimizer
from .quantized import Empty, packed_constants
from .served import serve
from .skeleton import Skeleton
from .tape import Recording, Tape

STEPS = 2  # the optimizer's state appears with the first one, and is alive in all of the second


def run(skeleton: Skeleton, scenario: Scenario, empty: Empty, shapes: Any = None) -> Recording:
    """Train for two steps.

    Args:
        skeleton: the model, changed by this: hooked, checkpointed, trained.
        scenario: what to run on it.
        empty: makes the batch.
        shapes: runs the operations on hollow tensors; None, with `empty` making real ones, runs them for real.
    """
    all_true = scenario.attention == "flash" or not (scenario.padded or scenario.packed)
    tape = Tape(shapes=shapes, all_true=all_true, counters=scenario.device == "cpu")
    model = skeleton.model
    register_state(tape, skeleton, scenario, empty)
    trainable = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if scenario.device == "cuda":
            stack.enter_context(triton_tiles())
            stack.enter_context(recomputed_alike(flash=scenario.flash_kernel))
        trainer = _Trainer(skeleton, scenario)
        if scenario.prefix_cache:
            serve(skeleton, tape, empty, shapes)
        _mark_phases(skeleton, tape, trainer)
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda p: tape.recategorise(p.grad, "gradients"))
        embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        optimizer = Optimizer(scenario.optim, trainable, tape, device=scenario.device, embeddings=embeddings)
        stack.enter_context(tape)
        if scenario.device == "cuda":
            stack.enter_context(CudaWays(flash=scenario.flash_kernel))
        for step in range(1, STEPS + 1):
            for _ in range(min(2, scenario.accumulation)):
                batch = _batch(scenario, empty)
                tape.register((t for t in batch.values() if isinstance(t, torch.Tensor)), "activations")
                trainer.step_name = step
                tape.phase(f"{step}.forward.embed")
                loss = trainer.loss(batch)
                del batch
                tape.phase(f"{step}.backward.loss", "logits")
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            tape.phase(f"{step}.clip", "workspace")
            if scenario.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(trainable, scenario.max_grad_norm)
            tape.phase(f"{step}.optimizer", "optimizer")
            optimizer.step()
            for parameter in trainable:
                parameter.grad = None
    return tape.recording


def register_state(tape: Tape, skeleton: Skeleton, scenario: Scenario, empty: Empty) -> None:
    """Count what is there before the first step, each layer's own under its number."""
    model = skeleton.model
    layer_of = {module: index for index, layer in enumerate(skeleton.layers) for module in layer.modules()}
    on_host = scenario.frozen_layers if scenario.offload_prefix else 0
    for module in model.modules():
        layer = layer_of.get(module)
        if layer is not None and layer < on_host:
            continue
        tape.register(packed_constants(module), "quantization", layer)
        tape.register(_tensors(module), "parameters", layer)
        if scenario.ema == "device":
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            module.forge_shadows = [empty(tuple(p.shape), torch.float32) for p in own]  # alive as long as the model
            tape.register(module.forge_shadows, "optimizer", layer)
    if skeleton.reference is not None:
        layers = decoder_layers(skeleton.reference)
        layer_of = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
        for module in skeleton.reference.modules():
            tape.register(packed_constants(module), "reference_model", layer_of.get(module))
            tape.register(_tensors(module), "reference_model", layer_of.get(module))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """A module's own parameters, buffers, and tensors kept as plain attributes, such as `original_inv_freq`."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


class _Trainer:
    """The loss of the scenario's trainer, under its autocast and its checkpointing."""

    def __init__(self, skeleton: Skeleton, scenario: Scenario) -> None:
        self.step_name = 0
        self._scenario, self._skeleton = scenario, skeleton
        model = skeleton.model
        if scenario.checkpointing != "off":
            self._checkpoint(model)
        self._method = _stand_in(scenario, skeleton)
        model.forward = _as_accelerate_prepares(model.forward, scenario)
        if skeleton.reference is not None:
            skeleton.reference.forward = _as_accelerate_prepares(skeleton.reference.forward, scenario)

    def _checkpoint(self, model: Any) -> None:
        if hasattr(model, "peft_config") and self._scenario.trainer != "plain":
            model.enable_input_require_grads()
        compat.enable_checkpointing(model, use_reentrant=self._scenario.checkpointing == "reentrant")

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of one micro-batch."""
        tokens = batch["input_ids"].numel()
        count = batch["input_ids"].new_full((), tokens)
        result: torch.Tensor = self._method.compute_loss(self._skeleton.model, batch, num_items_in_batch=count)
        return result


def _as_accelerate_prepares(forward: Any, scenario: Scenario) -> Any:
    """`Accelerator.prepare_model` under mixed precision: autocast inside, fp32 outputs outside."""
    if scenario.autocast is None:
        return forward
    from accelerate.utils.operations import convert_outputs_to_fp32

    # fp16 is as wide as bf16, which is the one that the CPU's autocast has for training.
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    return convert_outputs_to_fp32(autocast(forward))


def _stand_in(scenario: Scenario, skeleton: Skeleton) -> Any:
    """An instance of the trainer's class that has what `compute_loss` reads."""
    import transformers
    import trl

    trainer_class, config_class = {
        "plain": (transformers.Trainer, transformers.TrainingArguments),
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[scenario.trainer]
    defaults = {}
    for each in fields(config_class):
        defaults[each.name] = each.default if each.default_factory is MISSING else each.default_factory()
    args = types.SimpleNamespace(**(defaults | dict(scenario.settings) | {"n_gpu": 1}))
    args.gradient_checkpointing = scenario.checkpointing != "off"
    args.gradient_checkpointing_kwargs = {"use_reentrant": scenario.checkpointing == "reentrant"}
    trainer: Any = object.__new__(trainer_class)
    model = skeleton.model
    trainer.__dict__ |= vars(args)
    trainer.__dict__ |= {
        "args": args,
        "model": model,
        "accelerator": _Accelerator(),
        "compute_loss_func": None,
        "label_smoother": None,
        "model_accepts_loss_kwargs": True,
        "current_gradient_accumulation_steps": scenario.accumulation,
        "num_virtual_tokens": 0,
        "compute_metrics": None,
        "preprocess_logits_for_metrics": None,
        "is_tp_enabled": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "get_tp_size": lambda: 1,
        "maybe_activation_offload_context": contextlib.nullcontext(),
    }
    base: Any = unwrap(model)
    text_config = base.config.get_text_config()
    coefficient = args.__dict__.get("router_aux_loss_coef")
    if coefficient is None:
        coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
    enabled = hasattr(text_config, "output_router_logits") and coefficient != 0.0
    if scenario.trainer != "plain" and enabled:
        text_config.output_router_logits = True
    if scenario.prefix_cache and getattr(text_config, "output_router_logits", False):
        raise ConflictError(
            "prefix_cache=True skips the frozen layers, and the auxiliary loss of this mixture's routers is taken over "
            "all of them. Switch it off (a preset with router_aux_loss_coef=0.0, config.output_router_logits=False), "
            "or train without the cache."
        )
    trainer.router_aux_loss_coef, trainer.aux_loss_enabled = coefficient, enabled
    if scenario.trainer == "dpo":
        losses = args.loss_type if isinstance(args.loss_type, (list, tuple)) else [args.loss_type]
        trainer.loss_types, trainer.loss_weights = list(losses), args.loss_weights or [1.0] * len(losses)
        trainer.precompute_ref_logps = scenario.reference == "precomputed"
        trainer.ref_model = skeleton.reference
        if args.disable_dropout:
            compat.disable_dropout(model)
            if skeleton.reference is not None:
                compat.disable_dropout(skeleton.reference)
    if scenario.trainer != "plain":
        compat.add_fused_head(unwrap(model), scenario.trainer)
        if skeleton.reference is not None:
            compat.add_fused_head(skeleton.reference, "reference")
    return trainer


class _Accelerator:
    """What a trainer asks of accelerate while it computes a loss, in one process."""

    parallelism_config = None
    num_processes = 1
    device = torch.device("cpu")

    @staticmethod
    def gather_for_metrics(value: Any) -> Any:
        return value

    gather = gather_for_metrics

    @staticmethod
    def unwrap_model(model: Any, *_: Any, **__: Any) -> Any:
        return model


def _batch(scenario: Scenario, empty: Empty) -> dict[str, Any]:
    """The tensors that the trainer's collator makes."""
    rows, length = scenario.rows, scenario.sequence_length
    shape = (1, rows * length) if scenario.packed else (rows, length)
    if scenario.trainer == "dpo":
        names = ["input_ids", "attention_mask", "completion_mask"]
    else:
        names = ["input_ids", "position_ids" if scenario.packed else "attention_mask", "labels"]
    batch = {name: empty(shape, torch.long, name) for name in names}
    if scenario.trainer == "dpo" and scenario.reference == "precomputed":
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[name] = empty((scenario.batch_size,), torch.float32, name)
    return batch


def _mark_phases(skeleton: Skeleton, tape: Tape, trainer: _Trainer) -> None:
    """Hooks that say where the step is: in which layer, forward or backward."""

    def entering(way: str, index: int) -> Any:
        def hook(*_: Any) -> None:
            if not in_backward():  # else it is recomputed, in that layer's backward
                tape.phase(f"{trainer.step_name}.{way}.layer", layer=index)

        return hook

    def leaving(index: int) -> Any:
        def arriving(_gradient: torch.Tensor) -> None:
            tape.phase(f"{trainer.step_name}.backward.layer", layer=index)

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(arriving)  # type: ignore[no-untyped-call]

        return hook

    def before_reference(*_: Any) -> None:
        tape.phase(f"{trainer.step_name}.reference.embed")

    def after_backbone(*_: Any) -> None:
        tape.phase(f"{trainer.step_name}.forward.loss", "logits")

    for index, layer in enumerate(skeleton.layers):
        layer.register_forward_pre_hook(entering("forward", index))
        layer.register_forward_hook(leaving(index))
    _backbone(skeleton.model).register_forward_hook(after_backbone)
    if skeleton.reference is not None:
        for index, layer in enumerate(decoder_layers(skeleton.reference)):
            layer.register_forward_pre_hook(entering("reference", index))
        _backbone(skeleton.reference).register_forward_pre_hook(before_reference)
        _backbone(skeleton.reference).register_forward_hook(after_backbone)


def _backbone(model: nn.Module) -> nn.Module:
    """The model without its head."""
    base: Any = unwrap(model)
    backbone: nn.Module = base.get_submodule(base.base_model_prefix) if base.base_model_prefix else base
    return backbone
