"""EMACallback: the average, tied to the events of a standard trainer."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...errors import ForgeError, ForgeWarning
from . import checkpoint, support
from .average import EMA
from .decay import Decay, check
from .evaluation import EvaluationSwap

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class EMACallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers carries no types
    """Average the trainable weights while they train; evaluate, keep the best and save by the average.

    For `Trainer`, `SFTTrainer` and `DPOTrainer`, with adapters, `modules_to_save` or a full model:

        ema = EMACallback()
        trainer = SFTTrainer(model=model, args=args, train_dataset=train, callbacks=[ema])
        trainer.train()
        ema.apply_ema(model)        # from here on the model is its average; ema.restore(model) takes it back

    - **Training** goes on with the raw weights. Each optimizer step that was really taken moves the average; one that
      fp16's scaler or MonitorCallback dropped does not count, nor do micro-batches.
    - **Evaluation** (`evaluate=True`) sees the average, in the loop and by `trainer.evaluate()` or `predict()` later.
      Before the first `train()` there is none, and evaluation is raw. `load_best_model_at_end` ends with the average
      that earned the score.
    - **Checkpoints** (`save=True`) hold an `ema` folder that `PeftModel.from_pretrained`, or `from_pretrained`, loads.
      A resumed run goes on with it, bit for bit.
    - **A second `train()`** starts a new average from the weights that it finds.

    The shadow is fp32 and as large as the trainable parameters. Of LoRA the average of A and that of B are kept, which
    is not the average of B @ A. Not supported, and refused before the first step: FSDP, DeepSpeed, tensor parallelism,
    DataParallel, layer-wise and schedule-free optimizers.

    Example:
        >>> EMACallback(decay=0.999)
        EMACallback(decay=0.999)

    Logged keys: none. Evaluation keeps its own names (`eval_loss`).

    Args:
        decay: What the average keeps of itself over one optimizer step, in (0, 1), from the first step on and without
            a warm-up. 0.999 spans thousands of steps: a run that is shorter gets a warning.
        half_life_steps: Instead of `decay`: optimizer steps until a weight's share is halved. Without both it is 5% of
            `max_steps`. These two forget faster at first, by `min(decay, (1 + n) / (10 + n))`.
        update_every: Optimizer steps between updates; the decay per step stays what it was.
        device: Where the shadow lives: "cpu" spares the GPU's memory and costs a copy per update. By default beside
            each parameter.
        evaluate: Whether evaluation sees the average.
        save: Whether checkpoints hold it.
        resume_from: Where the next `train()` gets its average: a checkpoint or `ema` folder, or "weights" for beginning
            a new one at the weights that are resumed. Only needed when the checkpoint has none, or was moved.

    Raises:
        ConflictError: Values that exclude each other.
        ForgeError: A value outside its range, or no average in `resume_from`.
    """

    def __init__(
        self,
        decay: float | None = None,
        *,
        half_life_steps: float | None = None,
        update_every: int = 1,
        device: torch.device | str | None = None,
        evaluate: bool = True,
        save: bool = True,
        resume_from: str | Path | None = None,
    ) -> None:
        check(decay, half_life_steps, update_every)
        self.decay = decay
        self.half_life_steps = half_life_steps
        self.update_every = update_every
        self.device = device
        self.evaluate = evaluate
        self.save = save
        self.steps = 0
        self._start: checkpoint.SavedAverage | str | None = None
        if resume_from == checkpoint.WEIGHTS:
            self._start = checkpoint.WEIGHTS
        elif resume_from is not None:
            self._start = checkpoint.SavedAverage.read(Path(resume_from))
        self._ema: EMA | None = None
        self._raw: dict[str, Tensor] | None = None
        self._swap: EvaluationSwap | None = None
        self.attached = False
        self._schedule = Decay(0.5)
        self._saved = {"token": "", "folder": ""}
        self._run: tuple[TrainingArguments, TrainerState, TrainerControl, nn.Module, Any] | None = None

    # ---- for the user

    def apply_ema(self, model: nn.Module) -> None:
        """Put the average into the model, and keep the raw weights for `restore`. A second call changes nothing.

        Raises:
            ForgeError: There is no average yet, or the model is not the one that was trained.
        """
        ema = self._require()
        if self._raw is not None:
            return
        tensors = _named_parameters(model)
        raw = {name: tensors[name].detach().clone() for name in ema.average if name in tensors}
        ema.copy_to(tensors)
        self._raw = raw

    def restore(self, model: nn.Module) -> None:
        """Put the raw weights back.

        Raises:
            ForgeError: `apply_ema` was not called before.
        """
        import torch

        if self._raw is None:
            raise ForgeError("There is nothing to restore: apply_ema(model) was not called, or was undone already.")
        tensors = _named_parameters(model)
        with torch.no_grad():
            for name, value in self._raw.items():
                tensors[name].copy_(value)
        self._raw = None

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """A `with` block in which the model is its average; the raw weights come back, even on an exception."""
        if self._raw is not None:  # applied by hand: leave it so
            yield model
            return
        self.apply_ema(model)
        try:
            yield model
        finally:
            self.restore(model)

    def state_dict(self) -> dict[str, Any]:
        """`{"average": {name: fp32 tensor}, "updates": int, "steps": int}`; the tensors are copies."""
        return {**self._require().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; a `train()` that follows goes on from it.

        Raises:
            ForgeError: Names or shapes are not those of the trainable parameters.
        """
        if self._ema is not None:
            self._ema.load_state_dict(state)
            self.steps = int(state["steps"])
        average = {name: tensor.detach().clone() for name, tensor in state["average"].items()}
        self._start = checkpoint.SavedAverage(average, int(state["updates"]), int(state["steps"]))

    def attach(self, trainer: Trainer) -> EMACallback:
        """Run the trainer's whole evaluation loops on the average, instead of its forward passes one by one.

        Only needed where evaluation goes past the model's forward: `torch_compile`, `use_liger_kernel` with DPO, and
        trainers of your own. Adds the callback to the trainer when it is not in its list.

        Returns:
            Itself.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self.attached:
            return self
        inner = trainer.evaluation_loop

        @wraps(inner)
        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            if not self.evaluate or self._ema is None:
                return inner(*args, **kwargs)
            with self.swapped(trainer.model):
                return inner(*args, **kwargs)

        trainer.evaluation_loop = evaluation_loop
        self.attached = True
        return self

    # ---- events

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot be averaged, before anything is loaded or moved."""
        support.refuse_arguments(args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Start the average: at the weights, or where the resumed checkpoint's had come.

        Raises:
            UnsupportedError: This run cannot be averaged.
            ConflictError: Settings that exclude each other.
            ForgeError: A checkpoint is resumed that has no average.
        """
        support.refuse_arguments(args)
        support.refuse_model(model)
        support.refuse_settings(self, args, state, model)
        self._run = (args, state, control, model, kwargs.get("processing_class"))
        self._schedule = Decay.for_run(
            self.decay, self.half_life_steps, state.max_steps, update_every=self.update_every
        )
        self._raw = None
        if self._swap is not None:
            self._swap.remove()
        resumed = state.global_step > 0
        if resumed:
            checkpoint.drop_adapter_that_resuming_added(model)
        self._ema = EMA(_trainable(model), device=self.device)
        self.steps = 0
        self._begin_at(
            checkpoint.find_resumed(type(self).__name__, args, state)
            if resumed and self._start is None
            else self._start
        )
        self._start = None
        # A checkpoint that was saved without this callback has no entry for it, and the Trainer does not add one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if self.evaluate and not self.attached:
            self._swap = EvaluationSwap(self._ema.tensors, self._average_to_evaluate)
            self._swap.install(_innermost(optimizer), model)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check that training goes on with the raw weights.

        Raises:
            ForgeError: `apply_ema` was called during training and not undone.
        """
        if self._raw is not None:
            raise ForgeError(
                "apply_ema(model) was called during training and not undone: the next step would train the average "
                "and lose the raw weights. Use `with ema.swapped(model): ...`, or call ema.restore(model)."
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Count the step if it was taken, and update the average when it is due."""
        ema = self._require()
        if getattr(optimizer, "step_was_skipped", False):  # fp16's scaler found an infinity
            return
        if all(tensor.grad is None for tensor in ema.tensors.values()):  # somebody dropped the update
            return
        self.steps += 1
        if self.steps % self.update_every == 0:
            ema.update(self._schedule.at(ema.updates))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The loop is over."""
        if self._swap is not None:
            self._swap.end_of_loop()

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any,
        **kwargs: Any,
    ) -> None:
        """The loop is over."""
        self.on_evaluate(args, state, control, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """With `load_best_model_at_end`, end with the weights that earned the score: that checkpoint's average."""
        if self._swap is not None:
            self._swap.end()
        if self.evaluate and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._end_at_best(Path(state.best_model_checkpoint), model)
        self._run = None

    def state(self) -> dict[str, Any]:
        """Write the `ema` folder when the trainer asks for what belongs into its checkpoint.

        It asks when the checkpoint's files are there and before older ones are deleted; `on_save` comes after both.
        """
        if self._run is not None and self._run[2].should_save and self.save:
            self._write()
        return {"args": {}, "attributes": {"saved": dict(self._saved)}}

    # ---- behind them

    def _require(self) -> EMA:
        if self._ema is None:
            raise ForgeError("There is no average yet: it begins with trainer.train(). Put the callback in its list.")
        return self._ema

    def _average_to_evaluate(self) -> Mapping[str, Tensor] | None:
        applied = self._raw is not None
        return None if applied or self._ema is None else self._ema.average

    def _begin_at(self, start: checkpoint.SavedAverage | str | None) -> None:
        if isinstance(start, checkpoint.SavedAverage):
            self._require().load_state_dict({"average": start.average, "updates": start.updates})
            self.steps = start.steps

    def _end_at_best(self, folder: Path, model: nn.Module) -> None:
        self._raw = None
        if checkpoint.find(folder) is None:  # saved before this callback joined: raw weights earned that score
            self._ema = EMA(self._require().tensors, device=self.device)
            return
        self._begin_at(checkpoint.SavedAverage.read(folder))
        self.apply_ema(model)

    def _write(self) -> None:
        assert self._run is not None
        args, state, _, model, processing_class = self._run
        folder = checkpoint.run_folder(args, state) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            warnings.warn(
                f"The average is not in this checkpoint: it was expected at {folder}, and no such folder is there. "
                "Resuming from it will need resume_from=.",
                ForgeWarning,
                stacklevel=2,
            )
            return
        self._saved = {"token": uuid.uuid4().hex, "folder": str(folder.resolve())}
        ema = self._require()
        with self.swapped(model):
            checkpoint.save_model(model, folder / checkpoint.FOLDER, processing_class=processing_class)
        saved = checkpoint.SavedAverage(ema.average, ema.updates, self.steps, self._saved["token"])
        saved.write(folder / checkpoint.FOLDER)

    def __repr__(self) -> str:
        given = {"decay": self.decay, "half_life_steps": self.half_life_steps}
        inside = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return f"{type(self).__name__}({inside})"


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _named_parameters(model).items() if tensor.requires_grad}


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by the names that they have without DDP's and torch.compile's wrappers."""
    while hasattr(model, "_orig_mod") or type(model).__name__ == "DistributedDataParallel":
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return dict(model.named_parameters())


def _innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    inner: Optimizer = optimizer
    return inner
