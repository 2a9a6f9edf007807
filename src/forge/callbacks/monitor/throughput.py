"""Speed, from the host's clock and the shapes of the batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ...models import TrainingFlops


class Throughput:
    """Tokens, samples, FLOPs and seconds since the last `drain`.

    Training time is the time of steps and of waiting for their data; logging, evaluation and saving are not in it.

    Args:
        flops: What a step costs; without it there is no MFU.
        peak_flops: What the device can do, in FLOP/s; None where it is not known.
        processes: How many processes train alike; counts of this one are multiplied by it.
        preference_pairs: Whether rows come as chosen and rejected, with a reference model's forward pass beside.
        served: The share of the last forward pass that a PrefixCache stood in for; asked after each micro-batch.
        shared_reference: Whether the reference is the same model with its adapters off, and so served too. Its pass is
            the last of the two: while the cache is being filled it is served what the policy's had to compute, whose
            prefix is then not counted. So in a first epoch the MFU of DPO is too low, and nowhere too high.
    """

    def __init__(
        self,
        flops: TrainingFlops | None,
        peak_flops: float | None,
        *,
        processes: int = 1,
        preference_pairs: bool = False,
        served: Callable[[], float] = lambda: 0.0,
        shared_reference: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops = flops
        self._peak = peak_flops
        self._processes = processes
        self._pairs = preference_pairs
        self._served, self._shared_reference = served, shared_reference
        self._clock = clock
        self._begin = self._mark = clock()
        self._steps_done = 0
        self._real: Tensor | None = None
        self._reset()

    def mark(self) -> None:
        """Whatever ran until now was not a step."""
        self._mark = self._clock()

    def begin_step(self) -> None:
        """The data of a step has come."""
        now = self._clock()
        self._wait_s += now - self._mark
        self._train_s += now - self._mark
        self._mark = now

    def end_step(self) -> None:
        """A step is over, or one of its micro-batches."""
        now = self._clock()
        self._train_s += now - self._mark
        self._mark = now

    def count_step(self) -> None:
        """Count an optimizer step."""
        self._steps_done += 1

    def count(self, inputs: Any) -> None:
        """Count a micro-batch by its shapes, if it has any; what is padding is summed on the device."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if ids is None or getattr(ids, "ndim", 0) != 2:
            return
        rows, length = ids.shape
        boundaries = inputs.get("cu_seq_lens_q")
        if boundaries is not None:  # packed: one row, many sequences
            rows = boundaries.numel() - 1
            length = ids.numel() // max(1, rows)
        self._computed += ids.numel()
        self._samples += rows // 2 if self._pairs else rows
        mask = inputs.get("attention_mask")
        if mask is None or not hasattr(mask, "sum"):
            self._certain += ids.numel()
        else:
            real = mask.sum()
            self._real = real if self._real is None else self._real + real
        if self._flops is not None:
            served = self._served()
            self._work += self._flops.step(ids.numel(), length, served=served)
            if self._pairs and "ref_chosen_logps" not in inputs:
                served = served if self._shared_reference else 0.0
                self._work += self._flops.forward(ids.numel(), length, served=served)

    @property
    def real_tokens(self) -> Tensor | None:
        """The tokens that the masks do not hide, on the device; None where no batch had a mask."""
        return self._real

    def eta_s(self, steps_left: int) -> float:
        """Seconds to the end, by the mean so far, evaluation and saving included; after the first step."""
        return steps_left * (self._clock() - self._begin) / self._steps_done

    def drain(self, real_tokens: float, *, steps_left: int) -> dict[str, float]:
        """The metrics of the window, keyed as in MonitorCallback's table.

        Args:
            real_tokens: The value of `real_tokens`, read by the caller.
            steps_left: Optimizer steps until the end.
        """
        metrics: dict[str, float] = {}
        tokens = real_tokens + self._certain
        if self._train_s > 0 and self._samples:
            metrics["tokens_per_second"] = self._processes * tokens / self._train_s
            metrics["samples_per_second"] = self._processes * self._samples / self._train_s
            metrics["padding_share"] = 1 - tokens / self._computed
            if self._peak and self._work:
                metrics["mfu"] = self._work / self._train_s / self._peak
        if self._train_s > 0:
            metrics["data_wait_share"] = self._wait_s / self._train_s
        if self._steps_done:
            metrics["eta_s"] = self.eta_s(steps_left)
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._wait_s = self._train_s = self._work = 0.0
        self._computed = self._certain = self._samples = 0
        self._real = None
