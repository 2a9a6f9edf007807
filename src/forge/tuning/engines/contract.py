"""What a search asks of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...presets import Preset

RUNGS = (25, 50, 100)
"""Where a trial is held against the others: per cent of its own optimizer steps."""
Status = Literal["reached", "diverged", "failed", "out_of_memory"]


@dataclass(frozen=True)
class Task:
    """A trial, as an engine gets it.

    Args:
        number: of the trial.
        preset: its whole recipe.
        freeze_ratio: the share of the lowest layers that have no adapter.
        seed: of the adapter's first weights.
    """

    number: int
    preset: Preset
    freeze_ratio: float = 0.0
    seed: int = 42


@dataclass(frozen=True)
class Arrival:
    """A trial has come to a rung, or to its end.

    Args:
        number: of the trial.
        percent: the rung, or how far it came.
        status: "reached" a rung, or why it goes no further.
        loss: held-out, in nats per learnt token; NaN where it was not measured.
        steps: optimizer steps done.
        total_steps: of them.
        tokens: that it was trained on, without padding.
        seconds: its share of the wall time so far.
        why: a sentence, where it goes no further.
        trace: of the error, if it was one.
        curve: pairs of per cent and training loss since the beginning.
    """

    number: int
    percent: float
    status: Status
    loss: float
    steps: int
    total_steps: int
    tokens: int
    seconds: float
    why: str = ""
    trace: str = ""
    curve: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**vars(self), "curve": [list(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Arrival:
        """What `to_dict` gave."""
        return cls(**{**values, "curve": tuple((point[0], point[1]) for point in values["curve"])})


class Engine(Protocol):
    """Trains some trials at a time, from rung to rung."""

    name: str

    @property
    def free(self) -> int:
        """How many trials it can take on."""
        ...

    @property
    def numbers(self) -> Collection[int]:
        """The trials that it trains."""
        ...

    def add(self, task: Task) -> None:
        """Take a trial on, at its first step."""
        ...

    def advance(self) -> Sequence[Arrival]:
        """Train until some trials come to a rung together, or one ends early.

        What comes to a rung together is to be judged together; it is all that this returns then.
        """
        ...

    def drop(self, number: int) -> None:
        """Forget a trial."""
        ...

    def export(self, number: int, folder: Path) -> None:
        """Save a trial's adapter as PEFT does."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that is needed to go on, whole or not at all."""
        ...

    def load(self, folder: Path, tasks: Mapping[int, Task]) -> Sequence[Arrival]:
        """Go on where `save` was called, with those of its trials that are given here.

        Returns:
            What `advance` had returned last before it: what came of it may be lost.
        """
        ...

    def base(self) -> AbstractContextManager[PreTrainedModel]:
        """The base model without any adapter, for as long as the block runs."""
        ...

    def close(self) -> None:
        """Give the base back as it was."""
        ...
