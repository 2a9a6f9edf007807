"""What the decoder layers of a step cost, forward and backward, and what a step should cost with some of them frozen.

With F and B for the forward and backward cost of all layers, R for all else (embeddings, head, loss, optimizer) and the
lowest share f of the layers frozen, a step costs R plus

                       checkpointing      none
    all layers         2F + B             F + B
    truncated          F + (1-f)(F + B)   F + (1-f)B
    with the cache     (1-f)(2F + B)      (1-f)(F + B)

F and B are read in the all-layer steps themselves. R is what remains of them, so the first line is right by
construction; the others are what is held against measurements. An optimizer with fewer adapters to update is part of R
all the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of a step.

    Args:
        forward: of all layers once.
        backward: of all layers, without what checkpointing recomputes.
        rest: of everything else.
        checkpointing: whether the layers are recomputed in backward.
    """

    forward: float
    backward: float
    rest: float
    checkpointing: bool

    def step(self, frozen: float = 0.0, *, cached: bool = False) -> float:
        """What a step should take with the lowest share of the layers frozen, which a cache may answer for.

        >>> costs = LayerCosts(forward=1.0, backward=1.0, rest=0.0, checkpointing=True)
        >>> [round(costs.step(*f) / costs.step(), 2) for f in ([0.5], [0.75])]
        [0.67, 0.5]
        >>> [costs.step(f, cached=True) / costs.step() for f in (0.5, 0.75)]
        [0.5, 0.25]
        """
        again = self.forward if self.checkpointing else 0.0
        below = 0.0 if cached else frozen * self.forward
        return self.rest + below + (1 - frozen) * (self.forward + self.backward + again)


class StackClock:
    """Times the decoder layers of a model whose lowest layer trains, in the steps that are made while it is on.

    Forward is from the call of the lowest layer to the return of the highest, backward from the gradient of the highest
    one's output to that of the lowest one's last parameter, and holds what is recomputed. On a GPU the times are those
    of its queue.

    Args:
        layers: from the lowest up.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._marks: list[tuple[str, Any]] = []
        top = layers[-1]
        self._handles: list[Any] = [
            layers[0].register_forward_pre_hook(lambda *_: self._mark("begin")),
            top.register_forward_hook(self._returned),
        ]
        trained = [parameter for parameter in layers[0].parameters() if parameter.requires_grad]
        self._handles += [p.register_post_accumulate_grad_hook(lambda _: self._mark("reached")) for p in trained]

    def remove(self) -> None:
        """Time no more."""
        for handle in self._handles:
            handle.remove()

    def result(self, *, skip: int, checkpointing: bool) -> tuple[float, float]:
        """Seconds of forward and of backward alone, medians over the steps after the first `skip`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        forwards, backwards, last = [], [], {}
        for name, mark in self._marks:
            if name == "begin" and "reached" in last:
                forwards.append(_between(last["begin"], last["end"]))
                backwards.append(_between(last["arrived"], last["reached"]))
                last = {}
            last[name] = mark
        if "reached" in last:
            forwards.append(_between(last["begin"], last["end"]))
            backwards.append(_between(last["arrived"], last["reached"]))
        forward, backward = statistics.median(forwards[skip:]), statistics.median(backwards[skip:])
        return forward, backward - (forward if checkpointing else 0.0)

    def _returned(self, _: Any, __: Any, output: Any) -> None:
        if _in_backward():
            return
        self._mark("end")
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda _: self._mark("arrived"))

    def _mark(self, name: str) -> None:
        if name == "begin" and _in_backward():
            return  # recomputed
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.thread_time()))


def _between(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
