"""Which method of the Trainer is running: the one thing that a callback without a trainer can learn only by looking."""

from __future__ import annotations

import sys
from types import FrameType


def caller(function: str) -> FrameType | None:
    """The innermost frame of a function of this name among the callers, None when it is not running.

    >>> def evaluation_loop():
    ...     return caller("evaluation_loop") is not None
    >>> evaluation_loop(), caller("evaluation_loop")
    (True, None)
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame
