"""Which method of the Trainer is running: the one thing that a callback without a trainer can learn only by looking."""

from __future__ import annotations

import sys
from types import FrameType


def called_from(function: str) -> bool:
    """Whether a function of this name is among the callers.

    >>> def evaluation_loop():
    ...     return called_from("evaluation_loop")
    >>> evaluation_loop(), called_from("evaluation_loop")
    (True, False)
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False
