"""Once a run: a pass without the frozen layers, and with their output, is the pass with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UnsupportedError
from .samples import Sample
from .serving import farthest

if TYPE_CHECKING:
    from torch import Tensor


class Proof:
    """Layers above the boundary may read more of those below than their output: keys and values that they share, say.

    The pass is run again, without gradients and with the random numbers that it began with, so that dropout above the
    boundary is the same.
    """

    def __init__(self) -> None:
        self.done = False
        self.running = False
        self._random: tuple[Tensor, Tensor | None] | None = None

    def begin(self, device: torch.device) -> None:
        """A pass begins that may be held against another."""
        if not self.done and not self.running:
            self._random = (
                torch.get_rng_state(),
                torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            )

    def hold(self, again: Callable[[], Any], output: Any, samples: Sequence[Sample], tolerance: float) -> None:
        """Run the pass again, as far as its samples are stored, and compare.

        Args:
            again: the decoder's forward pass, which is served this time.
            output: what it returned the first time; its first item is (rows, tokens, hidden).
            samples: those in the batch.
            tolerance: how far, relative to its norm, a token's state may be from the first.

        Raises:
            UnsupportedError: it is another.
        """
        expected: Tensor = output[0]
        self.running = True
        try:
            with torch.no_grad(), self._same_random_numbers(expected.device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # and none should
                without: Tensor = again()[0]
        finally:
            self.running = False
        for sample in samples:
            own = sample.row, slice(sample.start, sample.stop)
            off = farthest(without[own].float(), expected[own].detach().float())
            if not off <= tolerance:
                raise UnsupportedError(
                    f"Without its frozen layers, and with their output, the decoder computes something else ({off:.1%} "
                    "off): layers above the boundary read more of those below than their hidden states. A PrefixCache "
                    "cannot serve it. Train without the cache: detach()."
                )
        self.done = True

    @contextmanager
    def _same_random_numbers(self, device: torch.device) -> Iterator[None]:
        assert self._random is not None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.set_rng_state(self._random[0])
            if self._random[1] is not None:
                torch.cuda.set_rng_state(self._random[1], device)
            yield
