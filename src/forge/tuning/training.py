"""The training of one adapter by the standard trainer, from its last checkpoint on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import TYPE_CHECKING, Any

from ..adapters import attach_adapter, safe_unload_peft_adapters
from ..callbacks import EMACallback, MonitorCallback
from ..callbacks.attachable import Attachable
from ..errors import ForgeError, NonFiniteError
from .arguments import arguments
from .interruption import StopAtStep, interruption

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer, TrainerCallback

    from .run_folder import RunFolder
    from .settle import Settled

logger = logging.getLogger("forge.tuning")


@dataclass(frozen=True)
class Trained:
    """What the training left, beside the weights in the model.

    Args:
        metrics: of the Trainer: `train_loss`, `train_runtime_s`, `steps`, and `peak_memory_gb` of a GPU.
        notes: what a reader should know.
        log: the Trainer's `log_history`.
        asked_to_stop: the signal that came in the last step, whose training is not lost for it.
    """

    metrics: Mapping[str, float]
    notes: tuple[str, ...]
    log: tuple[Mapping[str, Any], ...]
    asked_to_stop: Signals | None = None


def with_adapter(settled: Settled, base: PreTrainedModel) -> PeftModel:
    """The base with the recipe's adapter on it, initialised from the run's seed, and its prefix frozen."""
    from transformers import set_seed

    from ..freezing import setup_lp_lora_style

    set_seed(settled.config.seed)
    model = attach_adapter(base, settled.preset.get_lora_config())
    try:
        if settled.config.freeze_ratio:
            setup_lp_lora_style(model, freeze_ratio=settled.config.freeze_ratio)
    except BaseException:
        safe_unload_peft_adapters(model)
        raise
    return model


def as_saved(model: PeftModel) -> None:
    """Give `modules_to_save` the dtype that they have when the adapter is loaded on this base.

    They train in fp32; beside a base in 16 bits they would be evaluated as nobody will ever run them.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.to(next(module.original_module.parameters()).dtype)


def train(settled: Settled, model: PeftModel, folder: RunFolder, callbacks: Sequence[TrainerCallback]) -> Trained:
    """Train, from the newest whole checkpoint if there is one; the weights in `model` are the result.

    Raises:
        TuningInterrupted: SIGINT came; a checkpoint is written.
        SystemExit: SIGTERM came; a checkpoint is written.
        NonFiniteError: the monitor stopped the run.
        ForgeError: the GPU's memory did not suffice.
    """
    import torch

    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        logger.info("Going on at %s.", checkpoint.name)
    ema = EMACallback() if settled.config.ema else None
    given = [callback for callback in callbacks if isinstance(callback, MonitorCallback)]
    monitor = given[0] if given else MonitorCallback(report_dir=folder.training, preset=settled.preset)
    with StopAtStep() as stop:
        own = [*settled.preset.get_callbacks(), *filter(None, [ema]), *([] if given else [monitor]), stop]
        trainer = _trainer(settled, model, folder, [*own, *callbacks])
        _attach(settled, trainer, [monitor, *callbacks])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except torch.OutOfMemoryError as error:
            raise ForgeError(_out_of_memory(settled, trainer)) from error
        finally:
            _detach(trainer, [monitor, *callbacks])
        whole = trainer.state.global_step >= trainer.state.max_steps
        if not whole:
            _refuse_broken(monitor, trainer, folder)
        if stop.asked is not None and not whole:
            raise interruption(stop.asked, _where(trainer, folder))
    if ema is not None:
        ema.apply_ema(model)
    metrics = {
        "train_loss": _mean_loss(trainer.state.log_history, float(output.training_loss)),
        "train_runtime_s": float(output.metrics.get("train_runtime", 0.0)),
        "steps": float(trainer.state.global_step),
    }
    if torch.cuda.is_available():
        metrics["peak_memory_gb"] = torch.cuda.max_memory_reserved() / 2**30
    return Trained(metrics, _notes(settled, trainer, checkpoint), tuple(trainer.state.log_history), stop.asked)


def _trainer(settled: Settled, model: PeftModel, folder: RunFolder, callbacks: list[TrainerCallback]) -> Trainer:
    from trl import DPOTrainer, SFTTrainer

    kind = DPOTrainer if settled.preset.objective == "dpo" else SFTTrainer
    return kind(
        model=model,
        args=arguments(settled.preset, settled.config, folder),
        train_dataset=settled.data.train,
        eval_dataset=settled.data.validation,
        processing_class=settled.tokenizer,
        callbacks=callbacks,
    )


def _attach(settled: Settled, trainer: Any, callbacks: Sequence[Any]) -> None:
    """What reaches further than events do: the monitor, the cache, and whatever of the caller's has an `attach`."""
    for callback in dict.fromkeys(callbacks):
        if isinstance(callback, Attachable) and hasattr(callback, "attach"):
            callback.attach(trainer)
    if settled.config.prefix_cache:
        from ..freezing import PrefixCache

        trainer._forge_prefix_cache = PrefixCache().attach(trainer)


def _detach(trainer: Any, callbacks: Sequence[Any]) -> None:
    """So that the same callbacks can serve the run when it goes on."""
    for callback in callbacks:
        if isinstance(callback, Attachable):
            callback._release(trainer)
    if (cache := vars(trainer).pop("_forge_prefix_cache", None)) is not None:
        cache.detach()


def _refuse_broken(monitor: MonitorCallback, trainer: Trainer, folder: RunFolder) -> None:
    broken = [event for event in monitor.events if event.kind == "nonfinite"]
    if broken and monitor.on_nan == "stop":
        raise NonFiniteError(
            f"The training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}: "
            f"{broken[-1].message} The weights before that step are in {folder.checkpoints}. Lower the learning rate "
            "and name another output_dir."
        )


def _notes(settled: Settled, trainer: Trainer, checkpoint: Path | None) -> tuple[str, ...]:
    state, config = trainer.state, settled.config
    notes = []
    if state.global_step < state.max_steps:
        notes.append(f"Stopped by a callback after {state.global_step} of {state.max_steps} steps.")
    if checkpoint is not None:
        notes.append(f"The training was interrupted; its seconds are those since {checkpoint.name}.")
    if config.freeze_ratio:
        cached = ", and a PrefixCache served them" if config.prefix_cache else ""
        notes.append(
            f"The lowest layers were frozen and have no adapters (freeze_ratio={config.freeze_ratio:g}){cached}."
        )
    if config.ema:
        notes.append("The adapter is the average of its last steps (EMACallback).")
    if trainer.args.load_best_model_at_end:
        notes.append(f"The adapter is that of the best checkpoint, step {state.best_global_step}.")
    return tuple(notes)


def _mean_loss(log: Sequence[Mapping[str, Any]], otherwise: float) -> float:
    """The mean of the logged losses over their steps: the Trainer's own mean knows only the part since it resumed."""
    total, before = 0.0, 0
    for entry in log:
        if "loss" in entry:
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / before if before else otherwise


def _where(trainer: Trainer, folder: RunFolder) -> str:
    return (
        f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in "
        f"{folder.checkpoints}."
    )


def _out_of_memory(settled: Settled, trainer: Trainer) -> str:
    estimate = settled.estimate
    return (
        f"The GPU's memory did not suffice at step {trainer.state.global_step + 1}; the estimate was "
        f"{estimate['total_estimated_gb']:.2f} GiB (at most {estimate['high_gb']:.2f}). Set a smaller "
        "per_device_train_batch_size (accumulation makes up for it) or max_length in another output_dir; "
        "plan_training says what each change saves."
    )
