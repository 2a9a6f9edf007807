"""How many trials to train in one pass: measured, in ten seconds, on the very model and rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from .contract import Task
    from .ground import Ground

logger = logging.getLogger("forge.tuning")

BUDGET_S = 10.0
WIDTHS = (1, 2, 4, 8, 16, 32)
MOST = WIDTHS[-1]
# A wider pack must be faster by this much: what is in one pass fails and waits together.
PAYS = 0.95


@dataclass(frozen=True)
class PackChoice:
    """What was measured.

    >>> PackChoice({1: 1.0, 2: 1.5, 4: 2.8}).width
    4

    Args:
        seconds: of a pass forward and backward, by the number of trials in it.
        why: a sentence where packing is out of the question.
    """

    seconds: Mapping[int, float]
    why: str = ""

    @property
    def width(self) -> int:
        """The number of trials at which one takes least; a wider one must be clearly better."""
        best = 1
        for width in sorted(self.seconds):
            if self.seconds[width] / width < PAYS * self.seconds[best] / best:
                best = width
        return best

    def speedup(self, width: int) -> float:
        """How much faster `width` trials are in one pass than one after another."""
        return self.seconds[1] * width / self.seconds[width]

    def __str__(self) -> str:
        if self.why:
            return self.why
        parts = [f"{width} in one pass: {self.speedup(width):.2f}x" for width in sorted(self.seconds) if width > 1]
        return f"Packing measured here, against one after another: {', '.join(parts) or 'only one trial fits'}."


def unpackable(tasks: Iterable[Task]) -> str:
    """Why some of these trials cannot be trained in a pack, as far as their recipes tell; empty where all can."""
    from .packed.engine import refuse_args
    from .packed.skeleton import refuse_config
    from .packed.slots import Hyper

    try:
        for task in tasks:
            args = task.preset.get_sft_config()
            refuse_args(args)
            refuse_config(task.preset.get_lora_config())
            Hyper.of(args, total=1)
    except UnsupportedError as error:
        return str(error)
    return ""


def choose_pack(ground: Ground, task: Task, *, most: int, budget_s: float = BUDGET_S) -> PackChoice:
    """Measure passes of 1, 2, 4, ... copies of a trial, until the memory, the trials or the time is used up.

    Args:
        ground: the model and the rows.
        task: a trial like those to come.
        most: trials that are wanted at a time.
        budget_s: seconds.

    Returns:
        The seconds by width, or why packing is out of the question.
    """
    from .packed.engine import PackedEngine

    try:
        engine = PackedEngine(ground, task.preset.get_sft_config(), capacity=most)
    except UnsupportedError as error:
        return PackChoice({}, str(error))
    try:
        engine.add(task)
        return PackChoice(_measure(engine, most, time.perf_counter() + budget_s))
    except UnsupportedError as error:
        return PackChoice({}, str(error))
    finally:
        engine.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(engine: Any, most: int, until: float) -> dict[int, float]:
    found: dict[int, float] = {}
    widths = [width for width in WIDTHS if width <= most]
    for number, width in enumerate(widths):
        # Each width gets an equal part of what is left, and a wider one that cannot end in time is not begun.
        left = until - time.perf_counter()
        expected = found.get(widths[number - 1], 0.0) * 2 if number else 0.0
        if number and 2 * expected > left:
            break
        try:
            found[width] = engine.time_pass(width, left / (len(widths) - number))
        except torch.OutOfMemoryError:
            break
    return found
