"""The packed engine: as many trials at a time as pay, on one base."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....adapters.memento import Memento
from ....compat import enable_checkpointing
from ....data.tokens import pad_token_id
from ....errors import UnsupportedError
from ....models.layers import decoder_layers
from ....reporting.charts import write_whole
from ...search.halving import diverged
from ..contract import Arrival, Task
from ..course import next_rung
from ..lane import Lane
from .frozen import FrozenPrefix
from .loss import prove_head
from .pack import Pack
from .skeleton import Skeleton, frozen_layers
from .slots import Hyper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..ground import Ground

logger = logging.getLogger("forge.tuning")

# Optimizer steps after which the losses are fetched from the device, to see whether a trial has diverged.
LOOK_EVERY = 10
FILE = "pack.pt"


class PackedEngine:
    """Trains up to `capacity` adapters in one pass each.

    Args:
        ground: what the trials share.
        args: the trainer's arguments of any of the trials: precision and checkpointing are the same for all.
        capacity: trials at a time.
        dtype: of the adapters; float64 in proofs.

    Raises:
        UnsupportedError: a model or arguments that cannot be trained packed.
    """

    name = "packed"

    def __init__(self, ground: Ground, args: Any, *, capacity: int, dtype: torch.dtype = torch.float32) -> None:
        refuse_args(args)
        self._ground, self._args, self.capacity = ground, args, capacity
        self._lanes: list[Lane] = []
        self._arrivals: list[Arrival] = []
        self._micros = 0
        self._width = capacity  # slots in one pass; fewer after the memory did not suffice
        self._alone = False
        self._losses: list[tuple[list[tuple[Lane, int]], torch.Tensor]] = []
        model = ground.model
        self._memento = Memento(model)
        try:
            _prepare(model, args)
            prove_head(model)
            self._skeleton = Skeleton(model)
            self._pack = Pack(model, pad=pad_token_id(ground.tokenizer), autocast=_autocast(args), dtype=dtype)
            self._prefix = FrozenPrefix(model, cache=ground.prefix_cache, args=args)
        except BaseException:
            self._memento.put_back(model, None)
            raise

    @property
    def free(self) -> int:
        """How many trials it can take on."""
        return self.capacity - len(self._lanes)

    @property
    def numbers(self) -> list[int]:
        """The trials that it trains."""
        return [lane.task.number for lane in self._lanes]

    def add(self, task: Task) -> None:
        """Take a trial on, at its first step."""
        course = self._ground.course(task)
        args = task.preset.get_sft_config()
        refuse_args(args)
        adapter, hyper = self._skeleton.create(task), Hyper.of(args, course.steps)
        self._fetch()
        self._pack.append(adapter, hyper)
        self._lanes.append(Lane(task, course, (self._micros, len(course.order))))
        self._move_boundary()

    def advance(self) -> Sequence[Arrival]:
        """Train until a cohort stands at a rung, or trials end early."""
        if not self._lanes:
            return []
        while True:
            found = self._at_rung() or self._micro_step() or self._look()
            if found:
                self._arrivals = found
                return list(found)

    def drop(self, number: int) -> None:
        """Forget a trial."""
        self._fetch()
        places = [place for place, lane in enumerate(self._lanes) if lane.task.number != number]
        if len(places) < len(self._lanes):
            self._lanes = [self._lanes[place] for place in places]
            self._pack.keep(places)
            self._move_boundary()

    def export(self, number: int, folder: Path) -> None:
        """Save a trial's adapter as PEFT does."""
        place = self.numbers.index(number)
        self._skeleton.save(self._lanes[place].task, self._pack.adapter(place), folder, self._ground.tokenizer)

    def save(self, folder: Path) -> None:
        """Write slots, optimizer, random state and cursors, whole or not at all."""
        import io

        self._fetch()
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "pack": self._pack.state_dict(),
            "lanes": [lane.state_dict() for lane in self._lanes],
            "arrivals": [arrival.to_dict() for arrival in self._arrivals],
            "micros": self._micros,
            "width": self._width,
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        file = io.BytesIO()
        torch.save(state, file)
        write_whole(folder / FILE, file.getvalue())

    def load(self, folder: Path, tasks: Mapping[int, Task]) -> Sequence[Arrival]:
        """Go on where `save` was called; trials that are not given are forgotten."""
        state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        self._pack.load_state_dict(state["pack"])
        kept = [place for place, lane in enumerate(state["lanes"]) if lane["number"] in tasks]
        self._lanes = [
            Lane.load(task, self._ground.course(task), lane)
            for lane in (state["lanes"][place] for place in kept)
            for task in (tasks[lane["number"]],)
        ]
        self._pack.keep(kept)
        self._arrivals = [Arrival.from_dict(arrival) for arrival in state["arrivals"]]
        self._micros, self._width = state["micros"], state["width"]
        self._move_boundary()
        torch.set_rng_state(state["random"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        return list(self._arrivals)

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The base with its own layers."""
        self._prefix.end()
        with self._pack.bare() as model:
            try:
                yield model
            finally:
                _prepare(model, self._args)
        self._move_boundary()

    def time_pass(self, width: int, budget_s: float) -> float:
        """Seconds of a pass with so many slots like the first one: the least of two or more.

        Args:
            width: slots.
            budget_s: for all of it.
        """
        lane, train = self._lanes[0], self._ground.train
        while len(self._pack.slots) < width:
            self._pack.append(self._pack.adapters[0], self._pack.slots.hypers[0])
        micro = lane.course.micro_batches // 2  # neither the first nor what is left over at the end
        rows = [train[row] for row in lane.course.rows(micro)]
        taken: list[float] = []
        began = time.perf_counter()
        while len(taken) < 3 or time.perf_counter() - began < budget_s:
            start = time.perf_counter()
            self._pack.backward(range(width), [rows] * width, [1] * width)
            _wait(self._pack.device)
            taken.append(time.perf_counter() - start)
            if len(taken) >= 2 and time.perf_counter() - began + taken[-1] > budget_s:
                break
        return min(taken[1:])  # the first one allocates

    def close(self) -> None:
        """Give the base back as it was, bit for bit."""
        self._prefix.end()
        self._pack.take_out()
        self._memento.put_back(self._ground.model, None)

    def _at_rung(self) -> list[Arrival]:
        """A cohort all of whose trials stand at their rung, measured."""
        for cohort in dict.fromkeys(lane.cohort for lane in self._lanes):
            group = [place for place, lane in enumerate(self._lanes) if lane.cohort == cohort]
            if all(self._lanes[place].waits for place in group):
                if ended := self._look():
                    return ended
                began = time.perf_counter()
                losses = self._held_out_losses(group)
                found = []
                for place, loss in zip(group, losses, strict=True):
                    lane = self._lanes[place]
                    lane.seconds += (time.perf_counter() - began) / len(group)
                    found.append(lane.arrival("reached", loss=loss))
                    lane.rung = next_rung(lane.steps, lane.course)
                return found
        return []

    def _micro_step(self) -> list[Arrival]:
        """One micro-batch of every trial that does not wait; trials that cannot go on."""
        places = [place for place, lane in enumerate(self._lanes) if not lane.waits]
        began = time.perf_counter()
        parts = [places[start : start + self._width] for start in range(0, len(places), self._width)]
        if self._alone:
            parts = [[place] for place in places]
        self._alone = False
        broken: dict[int, _Failure] = {}
        for part in parts:
            failure = self._backward(part)
            if failure is None:
                continue
            if len(part) == 1:
                broken[part[0]] = failure
                continue
            self._rewind(places)
            if failure.out_of_memory:
                self._width = -(-len(part) // 2)
                logger.warning(
                    "The memory did not suffice for %d trials in one pass; from here on it is %d. No trial is lost.",
                    len(part),
                    self._width,
                )
            else:  # whose error it is shows when each goes alone
                self._alone = True
                logger.warning("A pass of %d trials raised (%s); each is tried alone.", len(part), failure.why)
            return []
        whole = [place for place in places if place not in broken]
        ends = [place for place in whole if self._lanes[place].course.ends_step(self._lanes[place].micro)]
        if ends:
            losses = self._pack.step_loss.clone()
            self._pack.step(ends)
            self._losses.append(([(self._lanes[place], place) for place in ends], losses))
        elapsed = (time.perf_counter() - began) / max(1, len(places))
        for place in whole:
            lane = self._lanes[place]
            lane.tokens += self._tokens(lane, lane.micro)
            lane.micro += 1
            lane.seconds += elapsed
        self._micros += 1
        return [
            self._lanes[place].arrival(
                "out_of_memory" if failure.out_of_memory else "failed", why=failure.why, trace=failure.trace
            )
            for place, failure in broken.items()
        ]

    def _backward(self, places: Sequence[int]) -> _Failure | None:
        """One pass, and what went wrong in it."""
        lanes, train = [self._lanes[place] for place in places], self._ground.train
        try:
            self._pack.backward(
                places,
                [[train[row] for row in lane.course.rows(lane.micro)] for lane in lanes],
                [sum(train[row].learnt for row in lane.course.step_rows(lane.micro)) for lane in lanes],
            )
        except Exception as error:  # noqa: BLE001  # a trial that raises must not end the search
            # Words alone: the error's frames hold the memory that did not suffice.
            failure = _Failure(isinstance(error, torch.OutOfMemoryError), _head(error), traceback.format_exc())
        else:
            return None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return failure

    def _rewind(self, places: Sequence[int]) -> None:
        """Back to the beginning of the optimizer step, whose gradients are incomplete."""
        self._pack.forget_gradients(places)
        for place in places:
            lane = self._lanes[place]
            seen = lane.micro
            lane.rewind()
            for micro in range(lane.micro, seen):
                lane.tokens -= self._tokens(lane, micro)

    def _tokens(self, lane: Lane, micro: int) -> int:
        return sum(self._ground.lengths[row] for row in lane.course.rows(micro))

    def _look(self) -> list[Arrival]:
        """Trials that have diverged, as far as their losses were fetched by now."""
        if not self._losses or not (len(self._losses) >= LOOK_EVERY or any(lane.waits for lane in self._lanes)):
            return []
        self._fetch()
        return [lane.arrival("diverged", why=why) for lane in self._lanes if (why := diverged(lane.losses))]

    def _fetch(self) -> None:
        """Bring the losses of the steps since the last time to the host."""
        if not self._losses:
            return
        fetched = torch.stack([losses for _, losses in self._losses]).tolist()
        for (ended, _), losses in zip(self._losses, fetched, strict=True):
            for lane, place in ended:
                step = len(lane.losses)
                rows = lane.course.order[step * lane.course.batch : (step + 1) * lane.course.batch]
                lane.losses.append(losses[place] / max(1, sum(self._ground.train[row].learnt for row in rows)))
        self._losses = []

    def _held_out_losses(self, places: Sequence[int]) -> list[float]:
        sums = torch.zeros(len(places), dtype=torch.float64)
        rows = sorted(self._ground.held_out, key=lambda row: -len(row.input_ids))
        for start in range(0, len(places), self._width):
            part = places[start : start + self._width]
            for batch in _batches(rows, self._ground.micro_batch * self._width // len(part)):
                sums[start : start + len(part)] += self._pack.evaluate(part, batch).cpu()
        return (sums / max(1, self._ground.held_out_tokens)).tolist()

    def _move_boundary(self) -> None:
        total = len(decoder_layers(self._ground.model))
        depths = [frozen_layers(lane.task, total) for lane in self._lanes]
        self._prefix.move(min(depths, default=0))


@dataclass(frozen=True)
class _Failure:
    """Why a pass did not come to its end."""

    out_of_memory: bool
    why: str
    trace: str


def refuse_args(args: Any) -> None:
    """Raise for arguments whose meaning packed training does not keep.

    Raises:
        UnsupportedError: with what to do instead.
    """
    said = {
        "packing": getattr(args, "packing", False),
        "neftune_noise_alpha": getattr(args, "neftune_noise_alpha", None),
        "label_smoothing_factor": getattr(args, "label_smoothing_factor", 0),
        "loss_type": getattr(args, "loss_type", None) not in (None, "nll", "chunked_nll") and args.loss_type,
        "fp16": args.fp16,
        "torch_compile": args.torch_compile,
        "deepspeed": getattr(args, "deepspeed", None),
    }
    for name, value in said.items():
        if value:
            raise UnsupportedError(
                f"{name}={value!r} cannot be trained packed with other trials. Leave it out, or search with "
                "engine='shared', which trains one adapter at a time."
            )


def _prepare(model: PreTrainedModel, args: Any) -> None:
    """Freeze the base, and checkpoint as the arguments say."""
    model.requires_grad_(False)
    model.config.use_cache = False
    on = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", False)
    if on:
        # Reentrant checkpointing would look for gradients in its inputs, of which a frozen base has none.
        enable_checkpointing(model, use_reentrant=False)
    model.train()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _autocast(args: Any) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else None


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), max(1, size)):
        yield rows[start : start + max(1, size)]


def _head(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
