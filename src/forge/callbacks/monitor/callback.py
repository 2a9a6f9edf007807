"""MonitorCallback: the truth about a run, tied to the events of a standard trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from transformers import TrainerCallback

from ...errors import ForgeError, ForgeWarning, NonFiniteError, UnknownNameError
from ..attachable import Attachable
from ..support import refuse_hidden_gradients
from . import attachment, journal, report
from .display import Display
from .events import logger
from .gradients import first_bad_weight
from .guard import REMEDY, OnNan, OnSpike
from .run import MonitoredRun

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from ...presets import Preset


class MonitorCallback(Attachable, TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Keep NaN out of the weights and the log honest; measure the run; leave a report.

        monitor = MonitorCallback(report_dir="report")
        trainer = SFTTrainer(model=model, args=args, train_dataset=train, callbacks=[monitor])
        monitor.attach(trainer)
        trainer.train()

    **A loss or gradient that is not finite** never reaches the weights or the optimizer's state. `on_nan="stop"` drops
    that update and ends training with a checkpoint of finite weights, "skip" drops it and goes on (after twenty in a
    row it stops), "raise" raises NonFiniteError. The logged loss is the mean of the finite steps, with the number of
    the others beside it, and NaN when there is none. fp16's scaler skips its own infinities. In DDP all processes
    decide alike.

    **`attach(trainer)`** is what a plain callback cannot do without: it sees the loss of every step, the gradient norm
    before clipping and the batches, puts the metrics before the trackers of `report_to`, ends cleanly on an exception,
    and takes the place of the progress bar while `train()` runs. Without it gradients are still guarded, and a warning
    says what is missing.

    Each optimizer step costs one read from the device (loss and gradient norm together), each log entry one more.

    Example:
        >>> MonitorCallback(on_nan="skip")
        MonitorCallback(check_gradients=True, on_nan='skip', on_spike='warn')

    Logged keys, beside the Trainer's own `loss`, `grad_norm` (of the last step, before clipping) and `learning_rate`:

    | key | unit | what |
    |---|---|---|
    | `nonfinite_steps` | steps | steps since the last entry whose loss or gradient was not finite; only if any |
    | `grad_norm/<group>` | | before clipping: attention, mlp, embeddings, norms, other; lora_A, lora_B |
    | `update_ratio` | | norm of the step's change of the weights over the norm of the weights |
    | `tokens_per_second` | 1/s | without padding, of all processes; the seconds are those of steps and their data |
    | `samples_per_second` | 1/s | sequences, or preference pairs, of all processes |
    | `padding_share` | 0 to 1 | padding tokens over all tokens computed |
    | `mfu` | 0 to 1 | model FLOPs (those of LoRA, or above a frozen prefix) over the GPU's 16-bit peak; none in fp32 |
    | `data_wait_share` | 0 to 1 | time waiting for data over training time |
    | `eta_s` | s | to the end of training, evaluation and saving included |
    | `memory/peak_allocated_gb`, `memory/peak_reserved_gb` | GiB | this process's GPU, since it began |
    | `memory/allocation_retries` | | frees of the cache that an allocation had to wait for, since the process began |
    | `memory/process_rss_gb`, `memory/system_used_percent` | GiB, % | RAM |
    | `gpu/utilization_percent`, `gpu/power_w`, `gpu/temperature_c` | %, W, C | by NVML, each second |
    | `cpu/process_percent`, `cpu/system_percent` | % | by psutil, each second |

    Args:
        check_gradients: Whether to look at gradients. False leaves the loss as the only guard, and saves the kernels.
        on_nan: "stop", "skip" or "raise".
        on_spike: A loss or gradient norm more than 6 sigma above the last 128 steps (from the 64th on): "warn", "skip"
            that update, or "stop".
        report_dir: Where `metrics.jsonl`, `report.html` and its plots go; None writes nothing.
        preset: The recipe, for the report.
        display: Whether to show what is logged: a live table on a terminal, else a line for each entry.

    Raises:
        UnknownNameError: An `on_nan` or `on_spike` that is none of these.
    """

    def __init__(
        self,
        check_gradients: bool = True,
        *,
        on_nan: OnNan = "stop",
        on_spike: OnSpike = "warn",
        report_dir: str | Path | None = None,
        preset: Preset | None = None,
        display: bool = True,
    ) -> None:
        for name, value, known in (("on_nan", on_nan, OnNan), ("on_spike", on_spike, OnSpike)):
            if value not in get_args(known):
                raise UnknownNameError.among(name, str(value), get_args(known))
        if report_dir is not None and Path(report_dir).exists() and not Path(report_dir).is_dir():
            raise ForgeError(f"report_dir={str(report_dir)!r} is a file: name a folder, which may be new.")
        self.check_gradients = check_gradients
        self.on_nan: OnNan = on_nan
        self.on_spike: OnSpike = on_spike
        self.report_dir = None if report_dir is None else Path(report_dir)
        self.preset = preset
        self.display = display
        self._display: Display | None = None
        self._run: MonitoredRun | None = None

    # ---- for the user

    @property
    def events(self) -> list[Any]:
        """What was noticed in the last `train()`: each with `step`, `kind` and `message`."""
        return [] if self._run is None else list(self._run.events.all)

    def attach(self, trainer: Trainer) -> MonitorCallback:
        """Let the callback see and reach what the Trainer does not hand to callbacks. Once, before `trainer.train()`.

        Adds the callback to the trainer when it is not in its list, and moves it to the front.

        Returns:
            Itself.

        Raises:
            ForgeError: It is attached to another trainer.
        """
        if not self._claim(trainer):
            return self
        self._display = Display() if self.display else None
        quiet = self._display is not None and not self._display.in_notebook
        attachment.attach(trainer, self, self, quiet=quiet)
        return self

    def write_report(self) -> Path:
        """Write `report.html` and its plots from what `report_dir` holds by now; returns the page's path.

        Raises:
            ForgeError: There is no `report_dir`, or nothing in it.
        """
        if self.report_dir is None:
            raise ForgeError("There is no report without a folder: MonitorCallback(report_dir=...).")
        if not (self.report_dir / journal.FILE).is_file():
            raise ForgeError(f"{self.report_dir} has no {journal.FILE} yet: it begins with trainer.train().")
        return report.write(self.report_dir, preset=self.preset)

    # ---- what attach() makes heard

    def on_micro_batch(self, inputs: Any, loss: Tensor) -> Tensor:
        """A micro-batch is over."""
        run = self._running()
        return loss if run is None else run.take_micro_batch(inputs, loss)

    def on_norm(self, norm: Any, max_norm: float) -> None:
        """Gradients were measured and clipped."""
        if (run := self._running()) is not None:
            run.take_norm(norm, max_norm)

    def on_leave(self, output: Any) -> Any:
        """`train()` is over, perhaps by an exception."""
        if self._run is None:
            return output
        self._leave()
        if output is not None and self._run.loss.nonfinite:
            # TRL 1.0 logs a copy of these metrics, so the ones that are returned have not been corrected yet.
            metrics = {
                **output.metrics,
                "train_loss": self._run.loss.mean,
                "nonfinite_steps": self._run.guard.bad_steps,
            }
            output = output._replace(training_loss=self._run.loss.mean, metrics=metrics)
        return output

    # ---- events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot be guarded."""
        refuse_hidden_gradients(args, "MonitorCallback")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Start.

        Raises:
            NonFiniteError: A trainable weight is not finite before the first step.
            UnsupportedError: Gradients are where no callback reaches them.
        """
        self._leave()
        refuse_hidden_gradients(args, "MonitorCallback")
        self._refuse_bad_weights(model)
        attached = self._is_attached(state)
        if not attached:
            self._say_what_is_missing(args)
        self._run = MonitoredRun(self, args, state, model, trainer=self._trainer if attached else None)
        self._run.start()
        if self._shows(state) and self._display is not None:
            self._display.start(state.max_steps, step=state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on it waits for data."""
        self._mark()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The data has come."""
        if self._run is not None:
            self._run.throughput.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-batch is over."""
        if self._run is not None:
            self._run.throughput.end_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        """Judge the step, and drop its gradients when it must not be taken.

        Raises:
            NonFiniteError: With `on_nan="raise"`, for a loss or gradient that is not finite.
        """
        run = self._run
        if run is None:
            return
        seen = len(run.events.all)
        verdict = run.judge(args, state, optimizer)
        if verdict == "stop" and (name := first_bad_weight(run.model)) is not None:
            run.may_save = False
            run.events.add(
                state.global_step + 1,
                "nonfinite",
                f"{name} itself is not finite: no checkpoint is written. Go back to the last good one.",
            )
        for event in run.events.all[seen:]:
            self._tell(event)
        if verdict == "raise":
            raise NonFiniteError(
                f"Step {state.global_step + 1}: {run.events.all[-1].message} The weights are those before it. {REMEDY}"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure how far the weights moved."""
        if self._run is not None:
            self._run.measure_update()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Count the step; stop when it was judged so."""
        if self._run is not None:
            self._run.throughput.end_step()
            self._run.throughput.count_step()
            if self._shows(state) and self._display is not None:
                left = state.max_steps - state.global_step
                self._display.count(state.global_step, self._run.throughput.eta_s(left))
            if self._run.stopping:
                control.should_training_stop = control.should_log = True
                control.should_save = self._run.may_save
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the truth and the metrics into the entry, for the history and for every callback after this one."""
        run = self._running()
        if run is None or logs is None:
            return
        if run.stopping:  # the Trainer would evaluate now, and with save_strategy="best" save only after a good score
            control.should_evaluate, control.should_save = False, run.may_save
        seen = len(run.events.all)
        changes = run.describe(logs, state)
        logs.update(changes)
        if state.log_history:  # the Trainer has put a copy of the entry there before it calls
            state.log_history[-1].update(changes)
        if run.journal is not None:
            run.journal.add(state.global_step, logs)
        for event in run.events.all[seen:]:
            self._tell(event)
        if self._shows(state) and self._display is not None:
            self._display.show(state.global_step, logs)
        self._mark()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far an evaluation has come."""
        if self._run is not None and self._run.running and self._shows(state) and self._display is not None:
            self._display.show_evaluation(kwargs.get("eval_dataloader"))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation is not training time."""
        if self._display is not None:
            self._display.end_evaluation()
        self._mark()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor is saving."""
        self._mark()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the threads and write the report."""
        self._leave()

    # ---- behind them

    def _running(self) -> MonitoredRun | None:
        return self._run if self._run is not None and self._run.running else None

    def _mark(self) -> None:
        if self._run is not None:
            self._run.throughput.mark()

    def _leave(self) -> None:
        """End what was begun; a second call does nothing."""
        if self._display is not None:
            self._display.stop()
        if self._run is not None and self._run.stop() and self._run.journal is not None:
            try:
                self.write_report()
            except Exception as error:  # noqa: BLE001  (whatever it is, it must not cost the training that it tells of)
                logger.warning("the report was not written: %r. MonitorCallback.write_report() tries again.", error)

    def _shows(self, state: TrainerState) -> bool:
        return self._trainer is not None and self._trainer.state is state and bool(state.is_world_process_zero)

    def _tell(self, event: Any) -> None:
        if self._run is not None and self._run.journal is not None:
            self._run.journal.add_event(event)
        if self._display is not None:
            self._display.add_event(event)

    def _refuse_bad_weights(self, model: nn.Module) -> None:
        if (name := first_bad_weight(model)) is not None:
            raise NonFiniteError(
                f"{name} holds NaN or infinity before the first step: training on from it is lost. Load the model "
                "or the checkpoint again; look at the step that made it."
            )

    def _say_what_is_missing(self, args: TrainingArguments) -> None:
        trackers = f", nor reach the trackers ({', '.join(args.report_to)})" if args.report_to else ""
        warnings.warn(
            "MonitorCallback has no trainer: it guards the gradients, and cannot see the loss (a NaN with finite "
            f"gradients, a spike), nor count tokens{trackers}. After building the trainer: monitor.attach(trainer).",
            ForgeWarning,
            stacklevel=2,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(check_gradients={self.check_gradients}, on_nan={self.on_nan!r}, "
            f"on_spike={self.on_spike!r})"
        )
