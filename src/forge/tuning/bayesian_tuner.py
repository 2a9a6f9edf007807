"""BayesianLoRATuner: better settings for a fraction of the compute."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError, UnsupportedError
from ..presets import Preset
from .config import TuningConfig
from .interruption import TuningInterrupted
from .run_folder import RunFolder
from .settle import settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import Judge
    from .study.result import StudyResult

logger = logging.getLogger("forge.tuning")


class StudyFolder(RunFolder):
    """The folder of a study.

    study.db, study.json   the study in Optuna's storage (unless it lies elsewhere), and what came of it
    crews/, turns/         checkpoints of the trials that are on the way
    trials/NUMBER/         adapters of the completed trials, and their evaluations
    report.html, plots/    for people
    """

    @property
    def has_progress(self) -> bool:
        """Whether anything in it would have to be done again."""
        return any((self.path / name).exists() for name in ("study.db", "study.json", "crews", "trials"))


class BayesianLoRATuner:
    """Search the settings of LoRA on one model and one data set.

        result = BayesianLoRATuner("Qwen/Qwen3-0.6B", "chats.jsonl", validation=0.1, n_trials=20).run()
        result.print()
        get_preset("qlora", **result.best_params)  # the winner's recipe

    Optuna samples; published settings come first. Many adapters train at once on one base where that pays, trials
    stop at a quarter and half of their steps where others were better, and what will not fit is never begun. The
    finalists are scored on held-out answers. docs/tuning.md walks through a search.

    Killed or interrupted, the same call goes on. Called in more processes with the same `storage` and `output_dir`,
    they share the work.

    Args:
        model_or_id: a hub id, a folder, or a live model; None takes `config.model_name`.
        train: whatever `prepare_dataset` takes, or what it made; None takes `config.train_data`.
        validation: held-out data, a share (0.1) or a number of rows to hold out; see `LoRATuner`.
        preset: "qlora", "lora", or a preset that you built; what the space does not name is taken from it.
        n_trials: how many settings are tried in all; None takes `config.n_trials`, which is 20.
        judge: a judge or its name; None takes `config.judge`.
        storage: the URL of the study's database; None takes `config.storage`, else SQLite in the study's folder.
        config: everything else: `space`, `sampler`, `objective`, `pack`, `workers`, ...; see `TuningConfig`.
        tokenizer: the model's, where it is not to be found beside it.

    Raises:
        ForgeError: what is missing or contradicts itself, as far as it can be told without reading anything.
    """

    def __init__(
        self,
        model_or_id: PreTrainedModel | str | os.PathLike[str] | None = None,
        train: Any = None,
        validation: Any = None,
        *,
        preset: str | Preset | None = None,
        n_trials: int | None = None,
        judge: Judge | str | bool | None = None,
        storage: str | None = None,
        config: TuningConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        config = TuningConfig() if config is None else config
        if not isinstance(config, TuningConfig):
            raise ConflictError(f"config={config!r:.60}: give a TuningConfig, such as TuningConfig(sampler='gp').")
        given = {"n_trials": n_trials, "judge": judge, "storage": storage}
        self.config = config.replace(**{name: value for name, value in given.items() if value is not None})
        self.model_or_id = config.model_name if model_or_id is None else model_or_id
        self.train = config.train_data if train is None else train
        self.validation = config.validation_data if validation is None else validation
        self.preset = config.preset if preset is None else preset
        self.tokenizer = tokenizer
        self._refuse()

    def __repr__(self) -> str:
        called = self.model_or_id if isinstance(self.model_or_id, str) else type(self.model_or_id).__name__
        return f"BayesianLoRATuner({called!r}, n_trials={self.config.n_trials}, output_dir={self.config.output_dir!r})"

    def run(self, *, resume: bool = True) -> StudyResult:
        """Search, or do what is left of it.

        Args:
            resume: whether a study in `config.output_dir` goes on, or is returned when it is over. If not, it is moved
                aside, never deleted.

        Returns:
            The winner, all trials, plots and the report.

        Raises:
            ForgeError: what will not do: the data, the space, the memory, another study in the folder; or three trials
                in a row failed alike.
            TuningInterrupted: a KeyboardInterrupt, whose message says how to go on.
        """
        from .search.objective import Objective
        from .search.space import SearchSpace
        from .search_run import Search, is_over, refuse_known
        from .study.result import StudyResult
        from .study.storage import close_storage, open_storage
        from .study.view import StudyView

        config = self.config
        objective = Objective.of(config)
        if not objective.scores:  # nothing is written, and nobody asked about it
            config = config.replace(bert_score=False, judge=None)
        folder = StudyFolder(config.output_dir)
        settled = settle(
            self.model_or_id,
            self.train,
            self.validation,
            preset=self.preset,
            config=config,
            tokenizer=self.tokenizer,
            folder=folder,
        )
        if settled.preset.objective == "dpo":
            raise UnsupportedError("preset='dpo': a search trains on conversations or texts. Take 'qlora' or 'lora'.")
        space = (config.space or SearchSpace()).bind(settled.preset)  # type: ignore[union-attr]
        search = Search(settled, space, objective, folder.path)
        if not resume and config.storage is not None:
            storage = open_storage(config.storage, folder.path)
            try:
                refuse_known(storage, search.study_name)
            finally:
                close_storage(storage)
        folder.begin(settled.record, resume=resume)
        if is_over(folder.path, config.n_trials):
            logger.info("The study in %s is over; this is its result.", folder.path)
            return StudyResult.load(folder.path)
        storage = open_storage(config.storage, folder.path)
        try:
            with search.open(storage) as ledger:
                with StudyView(lambda: ledger.study, n_trials=config.n_trials) as view:
                    search.work(ledger, [view])
                return search.conclude(ledger)
        except KeyboardInterrupt as error:
            said = f"Stopped; what was reached is in {folder.path}. "
            said += "Run the same again: each trial goes on at its last rung."
            logger.warning(said)
            raise TuningInterrupted(said) from error
        finally:
            close_storage(storage)

    def _refuse(self) -> None:
        missing = []
        if self.model_or_id is None:
            missing.append("a model: its id, its folder or the model itself (or config.model_name)")
        if self.train is None:
            missing.append("data to train on: a file, a hub id, rows (or config.train_data)")
        if missing:
            raise ConflictError(f"BayesianLoRATuner needs {' and '.join(missing)}.")
        if self.config.workers > 1 or self.config.launcher != "local":
            raise UnsupportedError(
                f"workers={self.config.workers}, launcher={self.config.launcher!r}: start the same script in as many "
                "processes, with the same storage and output_dir; they share the work. Leave both fields out."
            )
        if self.config.ema:
            raise ForgeError("ema=True: a search trains without averages. Leave it out, and train the winner with it.")
