"""A whole search by one process: which engine, the work, and the winner in the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, UnsupportedError
from ..evaluation.loss import held_out_loss
from ..evaluation.scoring import choose
from .engines import Engine, Task
from .engines.choose import MOST, choose_pack, unpackable
from .engines.ground import Ground, Row, rows_of
from .engines.shared import SharedEngine
from .fit import excess_gb
from .scoring import evaluated, evaluated_adapter, load_base, scores_of
from .search.dimensions import Choice, Fixed
from .search.priors import priors
from .search.samplers import make_sampler
from .study.ledger import Asked, Ledger
from .study.result import StudyResult
from .tracked_study import tell_trackers
from .worker import Watcher, Worker

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from transformers import PreTrainedModel

    from .search.objective import Objective
    from .search.space import BoundSpace
    from .settle import Settled

logger = logging.getLogger("forge.tuning")

# Trials that are judged together where packing does not pay: fewer would be halved on the evidence of one.
JUDGED_TOGETHER = 4
# A pack takes no more than so many parts of all trials at a time.
ROUNDS = 3
# What the estimate of a trial's memory does not depend on.
_WEIGHTLESS = {
    "learning_rate",
    "lora_alpha",
    "warmup_steps",
    "effective_batch_size",
    "num_train_epochs",
    "weight_decay",
}


def is_over(folder: Path, n_trials: int) -> bool:
    """Whether a folder holds the result of a study of as many trials as are wanted."""
    if not (folder / "study.json").is_file():
        return False
    return (StudyResult.load(folder).study.n_trials or 0) >= n_trials


def refuse_known(storage: RDBStorage, name: str) -> None:
    """Raise where a database outside of the study's folder has the study that was to begin anew.

    Raises:
        ConflictError: it has; moving the folder aside would not move the study.
    """
    if name in {study.study_name for study in storage.get_all_studies()}:
        raise ConflictError(
            f"resume=False, and the storage has a study {name!r} already, which nobody but you should delete. Give "
            "study_name=, or delete it: optuna delete-study."
        )


class Search:
    """What one process does for a study.

    Args:
        settled: data, base recipe, encoder and estimate.
        space: of the trials, bound to the recipe.
        objective: which figure decides in the end.
        folder: the study's.
    """

    def __init__(self, settled: Settled, space: BoundSpace, objective: Objective, folder: Path) -> None:
        self._settled, self._space, self._objective, self._folder = settled, space, objective, folder
        self._excess: dict[str, float] = {}
        self._refuse_what_cannot_be_tried()

    def open(self, storage: RDBStorage) -> Ledger:
        """Begin the study, or join it.

        Raises:
            ConflictError: a study of that name was begun with other settings.
        """
        settled, config = self._settled, self._settled.config
        record = settled.record
        return Ledger.open(
            storage,
            self.study_name,
            direction=self._objective.direction,
            n_trials=config.n_trials,
            space_distributions=self._space.distributions,
            make_sampler=lambda seed, number: make_sampler(config.sampler, seed, number),
            seed=config.seed,
            priors=priors(settled.preset, self._space),
            settings={
                "model": record["model"]["name"] or record["model"]["type"],
                "weights": record["model"]["weights"],
                "preset": record["preset"],
                "params": record["params"],
                "data": {side: one["fingerprint"] for side, one in record["data"].items()},
                "fixed": self._space.to_dict(),
                "sampler": config.sampler,
                "objective": self._objective.name,
                "score_every_trial": self._objective.score_every_trial,
                "config": record["config"],
            },
        )

    @property
    def study_name(self) -> str:
        """Of Optuna's study."""
        return self._settled.config.study_name or self._folder.name

    def work(self, ledger: Ledger, watchers: Sequence[Watcher] = ()) -> None:
        """Train trials until the study has all of them."""
        engine = self._engine(ledger)
        try:
            with ledger.lock("base"):
                if "base_loss" not in ledger.study.user_attrs:
                    with engine.base() as base:
                        ledger.settle(base_loss=self._loss_of(base))
            every = self._objective.score_every_trial and self._objective.scores
            Worker(
                ledger,
                engine,
                self._folder,
                make_task=self.task,
                excess_gb=self._excess_gb,
                score=(lambda number, adapter: self._scored(engine.base(), number, adapter)) if every else None,
                watchers=watchers,
            ).run()
        finally:
            engine.close()

    def conclude(self, ledger: Ledger) -> StudyResult:
        """Score the finalists, choose the winner, write the report.

        Raises:
            ForgeError: no trial was completed, or none could be scored.
        """
        with ledger.lock("conclude", timeout_s=24 * 3600):
            if is_over(self._folder, self._settled.config.n_trials):  # another process was first
                return StudyResult.load(self._folder)
            finished = [trial for trial in ledger.study.trials if trial.state.name == "COMPLETE"]
            best = sorted(finished, key=lambda trial: (trial.user_attrs["loss"], trial.number))
            said: dict[str, Any] = {"n_trials": self._settled.config.n_trials}
            if self._objective.scores and best:
                finalists = best if self._objective.score_every_trial else best[: self._objective.finalists]
                said |= self._contest(ledger, [trial.number for trial in finalists])
            elif best:
                said["winner"] = best[0].number
            ledger.settle(**said)
            study = ledger.study
            won = next((trial for trial in study.trials if trial.number == said.get("winner")), None)
            params = None if won is None else self.params(won.params)
            result = StudyResult.of(study, self._folder, preset=self._settled.preset.name, best_params=params)
            result.save()
            tell_trackers(self._settled.config, result, self._settled.record, self._recipe)
        return result

    def task(self, asked: Asked) -> Task:
        """The recipe of a trial."""
        return self._task(asked.number, asked.params)

    def params(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's recipe for `get_preset`: where layers freeze, with those that have adapters."""
        from .record import params_of

        task = self._task(0, raw)
        found = params_of(task.preset)
        if task.freeze_ratio:
            layers = int(self._settled.model_config.get_text_config(decoder=True).num_hidden_layers)
            found["layers_to_transform"] = list(range(math.floor(layers * task.freeze_ratio + 1e-9), layers))
        return found

    def _recipe(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """All values of a trial's recipe."""
        return {name: choice.value for name, choice in self._task(0, raw).preset.choices.items()}

    def _task(self, number: int, raw: Mapping[str, Any]) -> Task:
        params = self._space.params(raw)
        freeze_ratio = float(params.pop("freeze_ratio", self._settled.config.freeze_ratio))
        return Task(number, self._settled.preset.replace(**params), freeze_ratio, self._settled.config.seed)

    @cached_property
    def _ground(self) -> Ground:
        settled = self._settled
        assert settled.data.validation is not None  # settle() refuses data without
        rows = rows_of(settled.data.validation)
        chosen = choose(range(len(rows)), settled.config.max_eval_samples)
        return Ground(
            load_base(settled),
            settled.tokenizer,
            rows_of(settled.data.train),
            [rows[place] for place in chosen],
            self._micro_batch,
            settled.config.seed,
            settled.config.prefix_cache,
        )

    @property
    def _micro_batch(self) -> int:
        """The largest number of rows, up to the preset's, that divides every effective batch of the space."""
        most = int(self._settled.preset.choices["per_device_train_batch_size"].value)
        batch = self._space.dimensions["effective_batch_size"]
        values = batch.values if isinstance(batch, Choice) else (batch.only,) if isinstance(batch, Fixed) else (1,)
        common = math.gcd(*(int(value) for value in values))
        return max(size for size in range(1, most + 1) if common % size == 0)

    def _corners(self) -> list[Task]:
        """A trial for each value of each parameter that has some, beside the first prior."""
        first = priors(self._settled.preset, self._space)[0][1]
        found = [self._task(0, first)]
        for name, one in self._space.dimensions.items():
            if isinstance(one, Choice):
                found += [self._task(0, {**first, name: one.raw(value)}) for value in one.values]
        return found

    def _refuse_what_cannot_be_tried(self) -> None:
        """Build every recipe that the space names, before any weight is loaded."""
        for task in self._corners():
            task.preset.get_lora_config()
            task.preset.get_sft_config()

    def _engine(self, ledger: Ledger) -> Engine:
        ground = self._ground
        with ledger.lock("engine"):
            kind, width, why = self._chosen(ledger, ground)
        if why:
            logger.info("%s", why)
        args = self._corners()[0].preset.get_sft_config()
        if kind == "packed":
            from .engines.packed.engine import PackedEngine

            return PackedEngine(ground, args, capacity=width)
        if kind == "reload" and not isinstance(self._settled.model, str):
            raise UnsupportedError("engine='reload' loads the model anew: give its id or folder, not the model itself.")
        reload = (lambda: load_base(self._settled)) if kind == "reload" else None
        return SharedEngine(ground, self._folder / "turns", capacity=width, reload=reload)

    def _chosen(self, ledger: Ledger, ground: Ground) -> tuple[str, int, str]:
        """Engine and width: what this study has chosen before, what the config says, or what is measured."""
        config, before = self._settled.config, ledger.study.user_attrs.get("engine")
        if before:
            return str(before["name"]), int(before["width"]), ""
        cannot = unpackable(self._corners())
        kind, width, why = config.engine, config.pack, ""
        if kind == "packed" and cannot:
            raise UnsupportedError(cannot)
        if kind in ("shared", "reload") or cannot:
            kind, why = ("shared" if kind in ("auto", "packed") else kind), cannot
            width = JUDGED_TOGETHER if width == "auto" else width
        elif width == "auto":
            # A search that launched all its trials at once would learn nothing from the first for the last.
            most = min(MOST, -(-config.n_trials // ROUNDS))
            choice = choose_pack(ground, self._corners()[0], most=most)
            width, why = choice.width, str(choice)
            if (width == 1 and kind == "auto") or not choice.seconds:
                kind, width = "shared", JUDGED_TOGETHER
            else:
                kind = "packed"
        else:
            kind = "packed"
        width = max(1, min(int(width), config.n_trials))
        ledger.settle(engine={"name": kind, "width": width, "why": why})
        return kind, width, why

    def _excess_gb(self, raw: Mapping[str, Any]) -> float:
        """By how many GiB a trial alone surely exceeds the memory."""
        task = self._task(0, raw)
        key = str(sorted((name, str(value)) for name, value in raw.items() if name not in _WEIGHTLESS))
        if key not in self._excess:
            preset = task.preset.replace(
                effective_batch_size=self._micro_batch, per_device_train_batch_size=self._micro_batch
            )
            config = self._settled.config.replace(
                freeze_ratio=task.freeze_ratio,
                prefix_cache=self._settled.config.prefix_cache and task.freeze_ratio > 0,
            )
            self._excess[key] = excess_gb(self._settled.model_config, preset, config, longest=self._settled.longest)
        return self._excess[key]

    def _loss_of(self, model: PreTrainedModel) -> float:
        rows: Sequence[Row] = self._ground.held_out
        return held_out_loss(model, [row.input_ids for row in rows], [row.labels for row in rows]).mean

    def _scored(
        self, base: AbstractContextManager[PreTrainedModel], number: int, adapter: Path
    ) -> tuple[float, Mapping[str, float]]:
        """The objective's value of a trial's adapter, and all figures."""
        result = evaluated_adapter(self._settled, base, adapter, f"trial-{number}")
        figures = {name: value for name, value in scores_of(result).items() if name != "loss"}
        return self._objective.value(result), figures

    def _contest(self, ledger: Ledger, numbers: Sequence[int]) -> dict[str, Any]:
        """Score the base and the finalists; the best by the objective."""
        logger.info("Scoring the base and %d finalists by %s.", len(numbers), self._objective.name)
        base = evaluated(self._settled, self._ground.model, "base", self._folder / "evaluation" / "base")
        values = {}
        for number in numbers:
            adapter = self._folder / "trials" / str(number) / "adapter"
            values[number], figures = self._scored(nullcontext(self._ground.model), number, adapter)
            ledger.score(number, **figures)
        winner = max(values, key=lambda number: (values[number], -number))
        figures = {f"base_{name}": value for name, value in scores_of(base).items() if name != "loss"}
        return {"winner": winner, "finalists": list(numbers), **figures}
