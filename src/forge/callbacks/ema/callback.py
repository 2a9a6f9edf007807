"""EMACallback: the average, tied to the events of a standard trainer."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...errors import ConflictError, ForgeError, ForgeWarning
from ..attachable import Attachable
from ..stack import caller
from . import checkpoint, support
from .applied import Applied, named_as, named_parameters, trainable
from .average import EMA
from .decay import Decay, check
from .evaluation import EvaluationSwap

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class _Run(NamedTuple):
    """The `train()` that is going on, for `state()`, which is called without them."""

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    processing_class: Any


class EMACallback(Attachable, TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers carries no types
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
        self._applied = Applied()
        self._swap: EvaluationSwap | None = None
        self._schedule = Decay(0.5)
        self._saved: dict[str, str] = {}
        self._run: _Run | None = None

    # ---- for the user

    def apply_ema(self, model: nn.Module) -> None:
        """Put the average into the model, and keep the raw weights for `restore`. A second call changes nothing.

        Args:
            model: The one that was trained (`trainer.model`), or another with the same parameters.

        Raises:
            ForgeError: There is no average yet, the model has other parameters, or another model holds the average.
        """
        if self._ema is None and isinstance(self._start, checkpoint.SavedAverage):
            self._applied.apply(self._start.average, named_parameters(model))
        else:
            ema = self._require()
            self._applied.apply(ema.average, named_as(ema.tensors, model))

    def restore(self, model: nn.Module) -> None:
        """Put the raw weights back.

        Raises:
            ForgeError: `apply_ema` was not called before, or with another model.
        """
        self._applied.restore(named_as({} if self._ema is None else self._ema.tensors, model))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """A `with` block in which the model is its average; the raw weights come back, even on an exception."""
        was_applied = bool(self._applied)
        self.apply_ema(model)
        try:
            yield model
        finally:
            if not was_applied:  # what was applied by hand stays
                self.restore(model)

    def state_dict(self) -> dict[str, Any]:
        """`{"average": {name: fp32 tensor}, "updates": int, "steps": int}`; the tensors are copies."""
        if self._ema is None and isinstance(self._start, checkpoint.SavedAverage):
            average = {name: tensor.clone() for name, tensor in self._start.average.items()}
            return {"average": average, "updates": self._start.updates, "steps": self._start.steps}
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

        Raises:
            ForgeError: It is attached to another trainer.
        """
        if not self._claim(trainer):
            return self
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        inner = trainer.evaluation_loop

        @wraps(inner)
        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            listed = self in trainer.callback_handler.callbacks
            if not (listed and self.evaluate) or self._ema is None:
                return inner(*args, **kwargs)
            self._follow(trainer.model)
            with self.swapped(trainer.model):
                return inner(*args, **kwargs)

        trainer.evaluation_loop = evaluation_loop
        return self

    # ---- events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
        attached = self._is_attached(state)
        support.refuse_arguments(args)
        support.refuse_model(model)
        support.refuse_settings(self, args, state, model, attached=attached)
        support.refuse_optimizer(_innermost(optimizer))
        name = type(self).__name__
        if isinstance(state.stateful_callbacks.get(name), list):
            raise ConflictError(f"Two {name}s are in the list, and a checkpoint has room for one average. Keep one.")
        self._schedule = Decay.for_run(
            self.decay, self.half_life_steps, state.max_steps, update_every=self.update_every
        )
        resumed = state.global_step > 0
        if resumed:
            given = self._start.folder if isinstance(self._start, checkpoint.SavedAverage) else None
            folder = checkpoint.locate(name, args, state, given=given)
            if self._start is None:
                if folder is None:
                    raise checkpoint.not_found(name, state)
                self._start = checkpoint.SavedAverage.read(folder)
            checkpoint.mend_adapters(model, folder)
        self._applied.forget()
        self._ema = EMA(trainable(model), device=self.device)
        self.steps = 0
        self._begin_at(self._start)
        self._start = None
        self._run = _Run(args, state, model, kwargs.get("processing_class"))
        # A checkpoint that was saved without this callback has no entry for it, and the Trainer does not add one.
        state.stateful_callbacks.setdefault(name, {"args": {}, "attributes": {}})
        if self._swap is not None:
            self._swap.remove()
        if not attached:
            self._swap = EvaluationSwap(self._ema.tensors, self._average_to_evaluate)
            self._swap.install(_innermost(optimizer), model)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Take in what was unfrozen."""
        self._follow(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that training goes on with the raw weights.

        Raises:
            ForgeError: `apply_ema` was called during training and not undone.
        """
        if self._applied:
            raise ForgeError(
                "apply_ema(model) was called during training and not undone: the next step would train the average "
                "and lose the raw weights. Use `with ema.swapped(model): ...`, or call ema.restore(model)."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
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

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The loop is over."""
        if self._swap is not None:
            self._swap.end_of_loop()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """The loop is over."""
        self.on_evaluate(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """With `load_best_model_at_end`, end with the weights that earned the score: that checkpoint's average."""
        if self._swap is not None:
            self._swap.end()
            self._swap.training = False
        if self.evaluate and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._end_at_best(Path(state.best_model_checkpoint), model)
        self._run = None

    def state(self) -> dict[str, Any]:
        """Write the `ema` folder when the trainer asks for what belongs into its checkpoint.

        It asks when the checkpoint's files are there and before older ones are deleted; `on_save` comes after both.
        """
        # It also asks when it builds its state for a new train(), which may follow an interrupted one.
        if self._run is not None and self.save and caller("_save_checkpoint") is not None:
            self._write(self._run)
        return {"args": {}, "attributes": {"saved": dict(self._saved)}}

    # ---- behind them

    def _require(self) -> EMA:
        if self._ema is None:
            raise ForgeError("There is no average yet: it begins with trainer.train(). Put the callback in its list.")
        return self._ema

    def _average_to_evaluate(self) -> Mapping[str, Tensor] | None:
        if self._applied or not self.evaluate or self._ema is None:
            return None
        if self._run is not None:
            self._follow(self._run.model)
        return self._ema.average

    def _follow(self, model: nn.Module) -> None:
        """Average what has begun to train since, from what it is now."""
        ema = self._require()
        if joined := {name: tensor for name, tensor in trainable(model).items() if name not in ema.tensors}:
            ema.add(joined)

    def _begin_at(self, start: checkpoint.SavedAverage | str | None) -> None:
        if isinstance(start, checkpoint.SavedAverage):
            self._require().load_state_dict({"average": start.average, "updates": start.updates})
            self.steps = start.steps

    def _end_at_best(self, folder: Path, model: nn.Module) -> None:
        self._applied.forget()
        if checkpoint.find(folder) is None:  # saved before this callback joined: raw weights earned that score
            self._ema = EMA(self._require().tensors, device=self.device)
            return
        self._begin_at(checkpoint.SavedAverage.read(folder))
        self.apply_ema(model)

    def _write(self, run: _Run) -> None:
        folder = checkpoint.run_folder(run.args, run.state) / f"checkpoint-{run.state.global_step}"
        self._saved = {}  # never the token of an earlier checkpoint, whose average would be taken for this one's
        if not folder.is_dir():
            warnings.warn(
                f"The average is not in this checkpoint: it was expected at {folder}, and no such folder is there. "
                "Resuming from it will need resume_from=.",
                ForgeWarning,
                stacklevel=2,
            )
            return
        self._saved = {"token": uuid.uuid4().hex, "folder": str(folder.resolve())}
        self._follow(run.model)
        ema = self._require()
        with self.swapped(run.model):
            checkpoint.save_model(run.model, folder / checkpoint.FOLDER, processing_class=run.processing_class)
        saved = checkpoint.SavedAverage(ema.average, ema.updates, self.steps, self._saved["token"])
        saved.write(folder / checkpoint.FOLDER)

    def __repr__(self) -> str:
        given = {"decay": self.decay, "half_life_steps": self.half_life_steps}
        inside = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return f"{type(self).__name__}({inside})"


def _innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    inner: Optimizer = optimizer
    return inner
