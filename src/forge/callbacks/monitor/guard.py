"""Whether a step may reach the weights, from its loss and its gradient norm."""

from __future__ import annotations

import math
from typing import Literal

from .events import Events
from .watch import FLAT_STEPS, SIGMAS, ZERO_RATE_STEPS, FlatDetector, SpikeDetector, ZeroRun

OnNan = Literal["skip", "stop", "raise"]
OnSpike = Literal["warn", "skip", "stop"]
Verdict = Literal["take", "skip", "stop", "raise"]

PATIENCE = 20
"""So many bad steps in a row are not bad luck: "skip" turns into "stop". fp16's scaler halves its scale at each
infinity, and is through its range of 2^16 after 16."""


class Guard:
    """Judges every step before the optimizer takes it.

    >>> guard = Guard("skip", "warn", Events())
    >>> guard.judge(1, loss=2.0, norm=1.0)
    'take'
    >>> guard.events.is_main = False
    >>> guard.judge(2, loss=float("nan"), norm=1.0), guard.judge(3, loss=2.0, norm=float("inf"))
    ('skip', 'skip')

    Args:
        on_nan: What becomes of a step whose loss or gradient is not finite.
        on_spike: What becomes of a step whose loss or gradient norm is a spike.
        events: Where it is said.
    """

    def __init__(self, on_nan: OnNan, on_spike: OnSpike, events: Events) -> None:
        self.on_nan = on_nan
        self.on_spike = on_spike
        self.events = events
        self.bad_steps = 0
        self._bad_in_a_row = 0
        self._infinite_in_a_row = 0
        self._spikes = {"loss": SpikeDetector(), "gradient norm": SpikeDetector()}
        self._flat = FlatDetector()
        self._zero_rate = ZeroRun()

    def judge(
        self, step: int, *, loss: float | None, norm: float | None, scaled: bool = False, learning_rate: float = 1.0
    ) -> Verdict:
        """Judge a step.

        Args:
            step: Its number, from 1.
            loss: Over the whole batch; None where it is not known.
            norm: Of all gradients before clipping; None where it is not known.
            scaled: Whether fp16's scaler is at work. Infinite gradients are its normal way of finding the scale: it
                skips those steps itself, and they are left to it.
            learning_rate: The highest of the parameter groups.
        """
        if self._zero_rate.is_stuck(learning_rate):
            self.events.add_once(
                step,
                "zero_learning_rate",
                f"the learning rate has been 0 for {ZERO_RATE_STEPS} steps: nothing is learnt. Look at learning_rate, "
                "warmup_steps and the scheduler.",
            )
        bad_loss = loss is not None and not math.isfinite(loss)
        infinite = norm is not None and not math.isfinite(norm)
        if scaled and infinite:
            self._infinite_in_a_row += 1
            infinite = self._infinite_in_a_row > PATIENCE
        else:
            self._infinite_in_a_row = 0
        if bad_loss or infinite:
            return self._bad(step, loss, norm)
        self._bad_in_a_row = 0
        if loss is not None and self._flat.is_flat(loss):
            self.events.add_once(
                step,
                "flat_loss",
                f"the loss has not moved for {FLAT_STEPS} steps: is anything trainable, is the learning rate above 0, "
                "are there labels that are not -100?",
            )
        return self._judge_spikes(step, {"loss": loss, "gradient norm": norm})

    def _bad(self, step: int, loss: float | None, norm: float | None) -> Verdict:
        self.bad_steps += 1
        self._bad_in_a_row += 1
        what = _describe(loss, norm)
        if self.on_nan == "raise":
            self.events.add(step, "nonfinite", f'{what}; on_nan="raise".')
            return "raise"
        if self.on_nan == "skip" and self._bad_in_a_row <= PATIENCE:
            self.events.add(step, "nonfinite", f"{what}; the update was dropped, training goes on.")
            return "skip"
        many = f", the {self._bad_in_a_row}th in a row" if self.on_nan == "skip" else ""
        self.events.add(
            step, "nonfinite", f"{what}{many}; the update was dropped and training stops with a checkpoint. {REMEDY}"
        )
        return "stop"

    def _judge_spikes(self, step: int, values: dict[str, float | None]) -> Verdict:
        verdict: Verdict = "take"
        for name, value in values.items():
            if value is None or not math.isfinite(value) or not self._spikes[name].is_spike(value):
                continue
            done = {"warn": "it was taken", "skip": "the update was dropped", "stop": "training stops"}[self.on_spike]
            self.events.add(
                step,
                "spike",
                f"the {name} is {value:.4g}, more than {SIGMAS:g} sigma above the mean of the last "
                f"{self._spikes[name].steps} steps ({self._spikes[name].mean:.4g}); {done}. One odd batch is harmless, "
                "several mean that the learning rate is too high.",
            )
            verdict = "take" if self.on_spike == "warn" else self.on_spike
        return verdict


REMEDY = (
    "The usual causes: a learning rate that is too high, fp16 where bf16 would do, a batch whose labels are all -100, "
    "weights that were not finite to begin with."
)


def _describe(loss: float | None, norm: float | None) -> str:
    if loss is not None and not math.isfinite(loss):
        return f"the loss is {loss}"
    seen = f" though the loss is {loss:.4g}" if loss is not None else ""
    return f"the gradient norm is {norm}{seen}"
