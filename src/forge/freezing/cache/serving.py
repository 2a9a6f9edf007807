"""A forward pass with a cache below the boundary: what runs, what is stored, what is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConflictError, UnsupportedError
from .rows import Rows
from .samples import Sample
from .store import StateStore

if TYPE_CHECKING:
    from torch import Tensor

Opener = Callable[[int, torch.dtype], StateStore]


@dataclass
class Pass:
    """One forward pass of the decoder.

    Args:
        samples: what is in its batch.
        shape: (rows, length) of the batch.
        training: whether the model is in training mode.
        cached: the states of the samples that are in the store; the others are run.
        runs: whether the layers below run for the whole batch, whatever is stored: to learn what they return, and to
            hold what is stored against it.
        rows: those that run, where only some do.
    """

    samples: Sequence[Sample]
    shape: tuple[int, int]
    training: bool
    cached: dict[bytes, Tensor] = field(default_factory=dict)
    runs: bool = True
    rows: Rows | None = None


class Idle:
    """A cache that stands aside: nothing is stored and nothing read."""

    served = 0.0

    def below(self, index: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The layer runs."""
        del index
        return run(*args, **kwargs)

    def at_boundary(self, hidden_states: Tensor) -> Tensor:
        """What comes is what goes."""
        return hidden_states


class Serving:
    """What the layers of a truncated model ask: a `Shortcut` (models/truncation.py).

    Args:
        open_store: makes the store when the width and dtype of the states are known.
        tolerance: how far, relative to its norm, a token's state may be from what the store holds of it.
        flash: whether attention tells documents apart by itself, without a mask.
        on_run: called before layers below run.
    """

    def __init__(
        self, open_store: Opener, *, tolerance: float, flash: bool, on_run: Callable[[], None] | None = None
    ) -> None:
        self.served = 0.0
        self.checked: set[bool] = set()
        self.missed = 0
        self.hits = 0
        self.unstored = 0
        self.store: StateStore | None = None
        self._open_store = open_store
        self.tolerance = tolerance
        self._flash = flash
        self._on_run = on_run
        self._pass: Pass | None = None
        self._dtype: torch.dtype | None = None
        self._tuples: dict[int, int] = {}

    def begin(self, samples: Sequence[Sample], shape: tuple[int, int], *, training: bool, serve: bool = False) -> None:
        """A forward pass of the decoder begins.

        Args:
            samples: what is in its batch.
            shape: (rows, length).
            training: whether the model is in training mode: what is drawn at random there is not in evaluation.
            serve: read all of it, though nothing that was read has been held against the layers yet.
        """
        self.served = 0.0
        self._pass = now = Pass(samples, shape, training)
        if self.store is None or not samples:
            return
        now.cached = self._look_up(samples)
        missing = {sample.row for sample in samples if sample.key not in now.cached}
        if not self._tuples or (now.cached and training not in self.checked and not serve):
            return
        now.runs = len(missing) == shape[0] or (bool(missing) and shape[0] == 1)
        if not now.runs and missing:
            now.rows = Rows(torch.tensor(sorted(missing)), shape[0])
        if not now.runs:
            real = sum(sample.stop - sample.start for sample in samples)
            run = sum(sample.stop - sample.start for sample in samples if sample.row in missing)
            self.served = 1 - run / real

    @property
    def samples(self) -> Sequence[Sample]:
        """What is in the batch of this pass."""
        return self._pass.samples if self._pass is not None else ()

    def end(self) -> None:
        """The pass is over, or has failed."""
        self._pass = None

    def below(self, index: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A layer below the boundary is called."""
        now = self._pass
        if now is None:
            return run(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if not now.runs and now.rows is None:
            return self._as_returned(index, hidden)
        if index == 0:
            self._begin_running(now, hidden, kwargs)
        if now.rows is not None:
            if index == 0:
                now.rows.index = now.rows.index.to(hidden.device)
                hidden = hidden[now.rows.index]
            rest = now.rows.of(args[1:])
            kwargs = {name: now.rows.of(value) for name, value in kwargs.items() if name != "hidden_states"}
            return run(hidden, *rest, **kwargs)
        output = run(*args, **kwargs)
        self._learn(index, output)
        return output

    def at_boundary(self, hidden_states: Tensor) -> Tensor:
        """The lowest trained layer is called: give it whatever is cached, and store what is not."""
        now = self._pass
        if now is None:
            if self.served and torch._C._current_graph_task_id() != -1:
                raise UnsupportedError(
                    "The model's code checkpoints around the call of its decoder layers, so that backward asks for the "
                    "boundary's input again when the cache has forgotten it. Switch checkpointing off, or train "
                    "without the cache: detach()."
                )
            return hidden_states
        if now.runs:
            if self.store is None:
                self._dtype = hidden_states.dtype
                self.store = self._open_store(hidden_states.shape[-1], hidden_states.dtype)
                now.cached = self._look_up(now.samples)
            if now.cached:
                self._hold_against(now, hidden_states)
            self._add(now, hidden_states, {row: row for row in range(now.shape[0])})
            return hidden_states
        batch = self._read(now, hidden_states)
        if now.rows is not None:
            places = {int(row): place for place, row in enumerate(now.rows.index.tolist())}
            self._add(now, hidden_states, places)
            batch[now.rows.index] = hidden_states.to(batch.dtype)
        return batch

    def _look_up(self, samples: Sequence[Sample]) -> dict[bytes, Tensor]:
        assert self.store is not None
        if any(sample.key not in self.store for sample in samples):
            self.store.refresh()
        found = {sample.key: self.store.get(sample.key) for sample in samples}
        return {key: states for key, states in found.items() if states is not None}

    def _begin_running(self, now: Pass, hidden: Tensor, kwargs: Any) -> None:
        if hidden.ndim != 3 or hidden.shape[:2] != now.shape:
            raise UnsupportedError(
                f"The decoder's layers take hidden states of the shape {tuple(hidden.shape)}; a PrefixCache stores "
                "(rows, tokens, hidden). Train without the cache: detach()."
            )
        if self._on_run is not None:
            self._on_run()
        if len({(sample.row) for sample in now.samples}) < len(now.samples) and not self._flash:
            _refuse_seen_neighbours(now.samples, kwargs.get("attention_mask"))

    def _learn(self, index: int, output: Any) -> None:
        if isinstance(output, tuple):
            if any(item is not None for item in output[1:]):
                raise UnsupportedError(
                    f"Decoder layer {index} returns {len(output)} things beside each other; a PrefixCache can stand in "
                    "for hidden states alone. Train without the cache: detach()."
                )
            self._tuples[index] = len(output)
        else:
            self._tuples[index] = 0

    def _as_returned(self, index: int, hidden: Tensor) -> Any:
        length = self._tuples[index]
        return (hidden, *(None,) * (length - 1)) if length else hidden

    def _add(self, now: Pass, hidden: Tensor, places: dict[int, int]) -> None:
        """Store the samples that are not there yet; `places` says where a row of the batch is in `hidden`."""
        assert self.store is not None
        missing = [sample for sample in now.samples if sample.key not in now.cached]
        self.hits += len(now.samples) - len(missing)
        self.missed += len(missing)
        if not missing:
            return
        if self.store.full is None:
            host = hidden.detach().to("cpu", self.store.dtype)
            for sample in missing:
                states = host[places[sample.row], sample.start : sample.stop]
                if not bool(states.isfinite().all()):
                    _refuse_overflow(hidden, self.store.dtype)
                    self.unstored += 1  # the run itself is broken
                elif not self.store.add(sample.key, states):
                    self.unstored += 1
        else:
            self.unstored += len(missing)

    def _read(self, now: Pass, hidden: Tensor) -> Tensor:
        """The states of the whole batch on the layers' device, 0 where there is padding or nothing is cached."""
        assert self.store is not None
        if now.rows is None:
            self.hits += len(now.samples)
        device = hidden.device
        width = next(iter(now.cached.values())).shape[1]
        host = torch.zeros((*now.shape, width), dtype=self.store.dtype, pin_memory=device.type == "cuda")
        for sample in now.samples:
            if sample.key in now.cached:
                host[sample.row, sample.start : sample.stop] = now.cached[sample.key]
        return host.to(device, non_blocking=True).to(self._dtype)

    def _hold_against(self, now: Pass, hidden: Tensor) -> None:
        """Whether what is stored is what the layers compute."""
        for sample in now.samples:
            if sample.key not in now.cached:
                continue
            computed = hidden[sample.row, sample.start : sample.stop].float()
            stored = now.cached[sample.key].to(computed.device).float()
            off = farthest(stored, computed)
            if not off <= self.tolerance:
                raise ConflictError(
                    f"The cached states of a sample are {off:.1%} off what the frozen layers compute for it now "
                    f"(allowed: {self.tolerance:.1%}): something that they depend on is not in the key, such as "
                    "dropout, noise on the embeddings, or a neighbour in the batch. Train without the cache: detach()."
                )
        self.checked.add(now.training)


def _refuse_overflow(hidden: Tensor, dtype: torch.dtype) -> None:
    if bool(hidden.isfinite().all()):
        raise ConflictError(
            f"Hidden states reach {float(hidden.abs().max()):.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}. "
            "Take PrefixCache(dtype=torch.bfloat16), or None to store them as they are."
        )


def farthest(one: Tensor, other: Tensor) -> float:
    """The largest distance of a token's state from the other, relative to the other's norm."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-12)).max())


def _refuse_seen_neighbours(samples: Sequence[Sample], mask: Any) -> None:
    """Raise where attention lets a document see the one before it in the same row."""
    if mask is not None and not isinstance(mask, torch.Tensor):
        return  # flex attention's, made from the documents
    borders = [sample for sample in samples if any(s.row == sample.row and s.stop == sample.start for s in samples)]
    if mask is not None and mask.ndim == 4:
        rows = torch.tensor([sample.row if mask.shape[0] > 1 else 0 for sample in borders])
        at = torch.tensor([sample.start for sample in borders])
        seen = mask[rows, 0, at, at - 1]
        if not bool((seen if mask.dtype == torch.bool else seen >= 0).any()):
            return
    raise ConflictError(
        "The rows of this batch are packed, and attention lets a document see the ones before it in its row, so its "
        "states are not its own. Pass use_cache=False (model.config.use_cache = False), with which transformers keeps "
        "packed documents apart, or a flash attention kernel; or train without the cache: detach()."
    )
