"""One `train()` under the monitor's eyes: what it keeps from step to step, and what it makes of it for the log."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .device import device_memory, peak_of
from .events import Events
from .gradients import GradientGroups, UpdateRatio
from .guard import Guard, OnNan, OnSpike, Verdict
from .journal import Journal
from .loss import StepLoss, mean_of_finite
from .system import SystemSampler
from .throughput import Throughput

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer, TrainerState, TrainingArguments

FIRST_STEPS = 4
DEAD_AFTER = 3
"""A group is dead when its gradient was exactly 0 at three looks in a row. lora_A's is at the first step, since B
begins at 0, and once more when the warm-up begins with a learning rate of 0."""


class Settings(Protocol):
    """What MonitorCallback was asked for."""

    check_gradients: bool
    on_nan: OnNan
    on_spike: OnSpike
    report_dir: Path | None


class MonitoredRun:
    """The state of a run.

    Args:
        settings: The callback's.
        args: The trainer's arguments.
        state: The trainer's state, at the beginning of training.
        model: The model that trains.
        trainer: The trainer, where the callback is attached to it.
    """

    def __init__(
        self,
        settings: Settings,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        *,
        trainer: Trainer | None,
    ) -> None:
        self.events = Events()
        self.events.is_main = bool(state.is_world_process_zero)
        self.guard = Guard(settings.on_nan, settings.on_spike, self.events)
        self.loss = StepLoss()
        self.groups = GradientGroups(model) if settings.check_gradients else None
        self.update_ratio = UpdateRatio(self.groups.parameters) if self.groups is not None else None
        self.device = args.device
        self.stopping = False
        self.may_save = True
        self.model = model
        self.attached = trainer is not None
        self.system = SystemSampler()
        half = args.bf16 or args.fp16 or getattr(model, "dtype", None) in (torch.bfloat16, torch.float16)
        self.throughput = Throughput(
            _flops(model) if half else None,
            peak_of(args.device),
            processes=args.world_size,
            preference_pairs=hasattr(trainer, "ref_model"),
            served=_served(model),
            shared_reference=getattr(trainer, "ref_model", None) is None,
        )
        self.journal: Journal | None = None
        if settings.report_dir is not None and state.is_world_process_zero:
            self.journal = Journal(settings.report_dir, step=state.global_step)
        self.running = False
        self._norm: Tensor | None = None
        self._max_norm = math.inf
        self._group_norms: Tensor | None = None
        self._ratio: Tensor | None = None
        self._bad_before = 0

    def start(self) -> None:
        """Begin to sample the machine."""
        self.system.start()
        self.running = True

    def stop(self) -> bool:
        """End; says whether there was something to end."""
        was_running, self.running = self.running, False
        self.system.stop()
        return was_running

    # ---- each step

    def take_micro_batch(self, inputs: Any, loss: Tensor) -> Tensor:
        """Count a micro-batch; returns the loss that the Trainer may add up."""
        self.throughput.count(inputs)
        return self.loss.add(loss)

    def take_norm(self, norm: Any, max_norm: float) -> None:
        """Keep the norm before clipping, on the device."""
        if isinstance(norm, torch.Tensor):
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self._norm, self._max_norm = norm.detach(), max_norm

    def judge(self, args: TrainingArguments, state: TrainerState, optimizer: Optimizer) -> Verdict:
        """Decide on the step whose gradients are there, by one read; drop them when it is not to be taken."""
        step = state.global_step + 1
        due = self._logs_after(step, args, state)
        norm, known_norm = self._measure(step, due)
        loss, value = self.loss.take(), None
        if loss is not None or norm is not None:
            value, norm_value = _read(loss, norm)
        else:
            norm_value = None
        if value is not None:
            self.loss.finish(value)
        scaler = getattr(optimizer, "scaler", None)
        verdict = self.guard.judge(
            step,
            loss=value,
            # A norm after clipping says whether it is finite, and nothing about spikes.
            norm=norm_value if known_norm or norm_value is None or not math.isfinite(norm_value) else None,
            scaled=scaler is not None,
            # A rate that is a tensor would have to be read.
            learning_rate=max(
                (group["lr"] for group in optimizer.param_groups if not isinstance(group["lr"], torch.Tensor)),
                default=1.0,
            ),
        )
        self.stopping = self.stopping or verdict == "stop"
        if verdict != "take":
            self._drop(optimizer, unscaled=scaler is None or known_norm)
        elif due and self.update_ratio is not None and args.logging_strategy == "steps":
            self.update_ratio.before_step()
        return verdict

    def measure_update(self) -> None:
        """After the optimizer's step."""
        if self.update_ratio is not None:
            ratio = self.update_ratio.after_step()
            self._ratio = ratio if ratio is not None else self._ratio

    # ---- each entry of the log

    def describe(self, logs: dict[str, Any], state: TrainerState) -> dict[str, float]:
        """What an entry of the log must say otherwise, and more."""
        if "train_loss" in logs:
            return self._final()
        if "loss" not in logs:
            return {}
        changes = self._honest_loss()
        groups, ratio, tokens = self._read_window(logs.get("grad_norm"))
        changes |= {f"grad_norm/{name}": value for name, value in groups.items()}
        if ratio is not None:
            changes["update_ratio"] = ratio
        changes |= self.throughput.drain(tokens, steps_left=state.max_steps - state.global_step)
        return {**changes, **device_memory(self.device), **self.system.drain()}

    def _honest_loss(self) -> dict[str, float]:
        window = self.loss.drain()
        bad, self._bad_before = self.guard.bad_steps - self._bad_before, self.guard.bad_steps
        changes: dict[str, float] = {}
        if not all(map(math.isfinite, window)):
            changes["loss"] = mean_of_finite(window)
        elif bad and not self.attached:
            changes["loss"] = math.nan  # the Trainer's number may be made up, and there is none of our own
        if bad:
            changes["nonfinite_steps"] = bad
        return changes

    def _final(self) -> dict[str, float]:
        if self.groups is not None and self.groups.zero_streak is not None:
            self._report_dead(self.groups.zero_streak.tolist())  # where nothing was logged, nobody has looked yet
        if not self.guard.bad_steps:
            return {}
        loss = {"train_loss": self.loss.mean} if self.loss.nonfinite else {}
        return {**loss, "nonfinite_steps": self.guard.bad_steps}

    def _read_window(self, logged_norm: float | None) -> tuple[dict[str, float], float | None, float]:
        """Everything that waits on the device, in one copy."""
        tokens = self.throughput.real_tokens
        norms, ratio = self._group_norms, self._ratio
        streak = self.groups.zero_streak if self.groups is not None else None
        self._group_norms = self._ratio = None
        parts = [part.reshape(-1).float() for part in (norms, streak, ratio, tokens) if part is not None]
        if not parts:
            return {}, None, 0.0
        device = parts[0].device
        values = torch.cat([part.to(device) for part in parts]).tolist()
        groups: dict[str, float] = {}
        if norms is not None and self.groups is not None:
            count = len(self.groups.names)
            *each, total = values[: count + 1]
            del values[: count + 1]
            if not self.attached and logged_norm and total:  # measured after clipping: the log tells the norm before
                each = [norm * logged_norm / total for norm in each]
            groups = dict(zip(self.groups.names, each, strict=True))
        if streak is not None and self.groups is not None:
            count = len(self.groups.names)
            self._report_dead(values[:count])
            del values[:count]
        ratio_value = values.pop(0) if ratio is not None else None
        return groups, ratio_value, values.pop(0) if tokens is not None else 0.0

    def _report_dead(self, streaks: list[float]) -> None:
        assert self.groups is not None
        for name in [name for name, looks in zip(self.groups.names, streaks, strict=True) if looks >= DEAD_AFTER]:
            self.events.add_once(
                self._step,
                "zero_gradient",
                f"the gradients of {name} have been exactly 0 at the last {DEAD_AFTER} looks: nothing there is learnt. "
                "Is that part of the model used, is its adapter active, is it cut off by a detach or a frozen layer?",
            )

    # ---- behind them

    def _measure(self, step: int, due: bool) -> tuple[Tensor | None, bool]:
        """The gradient norm on the device, and whether it is the one before clipping."""
        self._step = step
        norm, self._norm = self._norm, None
        known = norm is not None
        if self.groups is None:
            return None, known
        if norm is None or due or step <= FIRST_STEPS:
            norms = self.groups.norms()
            self.groups.count_zeros(norms)
            if norm is not None and math.isfinite(self._max_norm):
                # Clipping has multiplied all gradients by this (torch.nn.utils.clip_grad_norm_).
                coefficient = torch.clamp(self._max_norm / (norm.to(norms.device) + 1e-6), max=1.0)
                norms = norms / coefficient
            self._group_norms = norms if due else None
            norm = norms[-1] if norm is None else norm
        return norm, known

    def _logs_after(self, step: int, args: TrainingArguments, state: TrainerState) -> bool:
        if args.logging_strategy == "steps":
            return step % state.logging_steps == 0 or (step == 1 and bool(args.logging_first_step))
        return bool(args.logging_strategy == "epoch")

    def _drop(self, optimizer: Optimizer, *, unscaled: bool) -> None:
        # A scaler that has not looked at a gradient yet refuses to step without one; it sees the infinity itself.
        if not unscaled:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _read(loss: Tensor | None, norm: Tensor | None) -> tuple[float | None, float | None]:
    """Two numbers by one read: a complex one is two."""
    known = loss if loss is not None else norm
    assert known is not None
    nothing = torch.zeros((), device=known.device)
    real = (nothing if loss is None else loss).float()
    imaginary = (nothing if norm is None else norm).to(real.device).float()
    both = torch.complex(real.reshape(()), imaginary.reshape(())).item()
    return (None if loss is None else both.real), (None if norm is None else both.imag)


def _flops(model: nn.Module) -> Any:
    """What a step costs, None for a model whose anatomy is not known: then there is no MFU, rather than a wrong one."""
    from ...errors import ForgeError
    from ...models import training_flops

    try:
        return training_flops(model)
    except (ForgeError, AttributeError):
        return None


def _served(model: nn.Module) -> Callable[[], float]:
    """What tells the share of the last forward pass's tokens that a PrefixCache stood in for; it may come later."""
    from ...errors import ForgeError
    from ...models.truncation import truncation_of

    try:
        truncation = truncation_of(model)
    except (ForgeError, AttributeError):
        truncation = None

    def served() -> float:
        shortcut = None if truncation is None else truncation.shortcut
        return 0.0 if shortcut is None else shortcut.served

    return served
