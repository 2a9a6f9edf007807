"""The shared engine: one base, one adapter at a time, through the standard SFTTrainer."""

from __future__ import annotations

import json
import logging
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback

from ...adapters import attach_adapter, cleanup_peft_model
from ...compat import train_in_order
from ...evaluation.loss import held_out_loss
from ...freezing import PrefixCache, setup_lp_lora_style
from ..publish import save_adapter
from ..run_folder import write_json
from .callback import StopAtRung
from .contract import Arrival, Task
from .course import next_rung
from .lane import Lane

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .ground import Ground

logger = logging.getLogger("forge.tuning")

FILE = "shared.json"


class SharedEngine:
    """Trains up to `capacity` trials in turns: each goes to its rung, and waits there without its adapter on the base.

    The trials come to the rungs in the order in which a pack of as many slots would, so that the same are stopped.

    Args:
        ground: what the trials share.
        folder: for the trainer's checkpoints, from which a trial goes on after its turn.
        capacity: trials that are judged together.
        reload: loads the base anew for each turn, where an adapter's traces cannot be undone; None keeps the ground's.
    """

    def __init__(
        self, ground: Ground, folder: Path, *, capacity: int, reload: Callable[[], PreTrainedModel] | None = None
    ) -> None:
        self.name = "shared" if reload is None else "reload"
        self._ground, self._folder, self.capacity, self._reload = ground, folder, capacity, reload
        self._lanes: list[Lane] = []
        self._arrivals: list[Arrival] = []
        # In micro-batches of a pack: now, and when each cohort left its last rung.
        self._clock, self._since = 0, dict[tuple[int, int], int]()

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
        self._lanes.append(Lane(task, course, (self._clock, len(course.order))))

    def advance(self) -> Sequence[Arrival]:
        """Train the cohort that comes to its rung next, one trial after another."""
        if not self._lanes:
            return []
        cohorts = dict.fromkeys(lane.cohort for lane in self._lanes)
        cohort = min(cohorts, key=self._due)
        due = self._due(cohort)
        group = [lane for lane in self._lanes if lane.cohort == cohort]
        found = [self._turn(lane) for lane in group]
        early = [arrival for arrival in found if arrival.status != "reached"]
        # What ended early is told alone, as a pack tells it; the others stand at their rung and are told next.
        self._arrivals = early or found
        if not early:
            self._clock = self._since[cohort] = due
            for lane in group:
                lane.rung = next_rung(lane.steps, lane.course)
        return list(self._arrivals)

    def drop(self, number: int) -> None:
        """Forget a trial and its checkpoints."""
        self._lanes = [lane for lane in self._lanes if lane.task.number != number]
        shutil.rmtree(self._of(number), ignore_errors=True)

    def export(self, number: int, folder: Path) -> None:
        """Save a trial's adapter as PEFT does."""
        beside = folder.with_name(f"{folder.name}.writing")
        for left in (beside, folder):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(self._of(number) / "adapter", beside)
        beside.rename(folder)

    def save(self, folder: Path) -> None:
        """Write the cursors; the trainer's checkpoints hold the rest."""
        state = {
            "lanes": [lane.state_dict() for lane in self._lanes],
            "arrivals": [arrival.to_dict() for arrival in self._arrivals],
            "clock": self._clock,
            "since": [[*cohort, clock] for cohort, clock in self._since.items()],
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, state)
        for lane in self._lanes:
            for path in self._of(lane.task.number).glob("checkpoint-*"):
                if path.name != f"checkpoint-{lane.steps}":
                    shutil.rmtree(path, ignore_errors=True)

    def load(self, folder: Path, tasks: Mapping[int, Task]) -> Sequence[Arrival]:
        """Go on where `save` was called; trials that are not given are forgotten."""
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
        self._lanes = [
            Lane.load(tasks[lane["number"]], self._ground.course(tasks[lane["number"]]), lane)
            for lane in state["lanes"]
            if lane["number"] in tasks
        ]
        self._arrivals = [Arrival.from_dict(arrival) for arrival in state["arrivals"]]
        self._clock = state["clock"]
        self._since = {(start, rows): clock for start, rows, clock in state["since"]}
        return list(self._arrivals)

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The base without any adapter."""
        yield self._ground.model if self._reload is None else self._reload()

    def close(self) -> None:
        """The base is as it was after every turn."""

    def _of(self, number: int) -> Path:
        return self._folder / f"trial-{number}"

    def _due(self, cohort: tuple[int, int]) -> int:
        """When a pack would bring a cohort to its rung: with all of its trials, of which the others wait."""
        left = [
            -(-lane.course.steps_at(lane.rung) * lane.course.batch // lane.course.micro_batch) - lane.micro
            for lane in self._lanes
            if lane.cohort == cohort
        ]
        return self._since.get(cohort, cohort[0]) + max(left)

    def _turn(self, lane: Lane) -> Arrival:
        """Train a trial to its rung and measure it there."""
        if lane.waits:
            return lane.arrival("reached", loss=lane.held_out)
        try:
            return self._train(lane)
        except torch.OutOfMemoryError:
            return lane.arrival("out_of_memory", why="The memory did not suffice.", trace=traceback.format_exc())
        except Exception as error:  # noqa: BLE001  # a trial that raises must not end the search
            said = str(error).strip().splitlines() or [""]
            return lane.arrival("failed", why=f"{type(error).__name__}: {said[0]}"[:200], trace=traceback.format_exc())

    def _train(self, lane: Lane) -> Arrival:
        import time

        began = time.perf_counter()
        with self.base() as base:
            torch.manual_seed(lane.task.seed)
            model = attach_adapter(base, lane.task.preset.get_lora_config())
            try:
                if lane.task.freeze_ratio:
                    setup_lp_lora_style(model, freeze_ratio=lane.task.freeze_ratio)
                why = self._fit(lane, model)
                lane.seconds += time.perf_counter() - began
                if why:
                    return lane.arrival("diverged", why=why)
                held_out = self._ground.held_out
                loss = held_out_loss(model, [row.input_ids for row in held_out], [row.labels for row in held_out])
                lane.held_out = loss.mean
                if lane.steps >= lane.course.steps:
                    save_adapter(model, self._ground.tokenizer, self._of(lane.task.number) / "adapter")
                return lane.arrival("reached", loss=loss.mean)
            finally:
                cleanup_peft_model(model)

    def _fit(self, lane: Lane, model: Any) -> str:
        """From the last checkpoint to the rung; why it stopped before, if it did."""
        with _quiet():
            return self._fit_quietly(lane, model)

    def _fit_quietly(self, lane: Lane, model: Any) -> str:
        from datasets import Dataset
        from trl import SFTTrainer

        ground, stop = self._ground, StopAtRung(lane)
        order = [ground.train[row] for row in lane.course.order]
        columns = {"input_ids": [list(row.input_ids) for row in order], "labels": [list(row.labels) for row in order]}
        trainer = SFTTrainer(
            model=model,
            args=self._arguments(lane),
            train_dataset=Dataset.from_dict(columns),
            processing_class=ground.tokenizer,
            callbacks=[*lane.task.preset.get_callbacks(), stop],
        )
        trainer.remove_callback(PrinterCallback)  # the search has a view of its own
        train_in_order(trainer)
        cache = None
        if ground.prefix_cache and lane.task.freeze_ratio:
            cache = PrefixCache().attach(trainer)
        at = self._of(lane.task.number) / f"checkpoint-{lane.steps}"
        try:
            trainer.train(resume_from_checkpoint=str(at) if lane.steps else None)
        finally:
            if cache is not None:
                cache.detach()
        lane.losses = [*lane.losses[: lane.steps], *stop.losses]
        before = lane.micro
        lane.micro = min(
            lane.course.micro_batches, trainer.state.global_step * lane.course.batch // lane.course.micro_batch
        )
        lane.tokens += sum(
            ground.lengths[row] for micro in range(before, lane.micro) for row in lane.course.rows(micro)
        )
        return stop.why

    def _arguments(self, lane: Lane) -> Any:
        from transformers.trainer_utils import IntervalStrategy, SaveStrategy

        course, args = lane.course, lane.task.preset.get_sft_config()
        args.output_dir = str(self._of(lane.task.number))
        args.seed = lane.task.seed
        args.per_device_train_batch_size = course.micro_batch
        args.gradient_accumulation_steps = course.batch // course.micro_batch
        args.num_train_epochs, args.max_steps = 1, course.steps
        args.save_strategy, args.save_total_limit = SaveStrategy.NO, None
        args.logging_strategy, args.logging_steps = IntervalStrategy.STEPS, 1
        args.eval_strategy, args.do_eval = IntervalStrategy.NO, False
        args.report_to, args.disable_tqdm = [], True
        args.logging_nan_inf_filter = False  # a NaN would be logged as 0.0, and the trial seem to learn
        return args


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of `datasets`, of which every turn would bring two."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
