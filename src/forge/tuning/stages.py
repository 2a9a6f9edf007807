"""The stages of a run; each leaves a file, and what is there is not done again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..adapters import cleanup_peft_model
from ..errors import ForgeError
from ..evaluation import EvaluationResult, compare_results
from ..evaluation.report import notes as page_notes
from .interruption import TuningInterrupted, held_back, interruption
from .publish import save_adapter, write_card
from .report import page
from .result import TuningResult
from .run_folder import RunFolder, write_json
from .scoring import evaluated, load_base, scores_of
from .tracked import TrackedRun
from .training import Trained, as_saved, train, with_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback

    from .settle import Settled

logger = logging.getLogger("forge.tuning")


class Stages:
    """Base evaluated, adapter trained, adapter evaluated, result written.

    Args:
        settled: the run.
        folder: where it goes; begun.
        callbacks: the caller's.
    """

    def __init__(self, settled: Settled, folder: RunFolder, callbacks: Sequence[TrainerCallback]) -> None:
        self._settled, self._folder, self._callbacks = settled, folder, tuple(callbacks)

    def run(self) -> TuningResult:
        """All that is not there yet; the model that was handed in comes back as it was, whatever happens."""
        settled, folder = self._settled, self._folder
        self._write_recipe()
        with folder.mine(), TrackedRun(settled, folder) as tracked, self._saying_where():
            base_model = self._load()
            base = self._evaluated("base", base_model)
            self._refuse_a_silent_judge(base)
            model = with_adapter(settled, base_model)
            del base_model
            try:
                trained = self._trained(model, tracked)
                tuned = self._evaluated("tuned", model)
            finally:
                with held_back():
                    cleanup_peft_model(model)
            result = self._result(base, tuned, trained)
            tracked.finish(result)
        logger.info("Done: %s", folder.report)
        return result

    def _write_recipe(self) -> None:
        try:
            self._settled.preset.save(self._folder.recipe)
        except ForgeError as why:  # values that JSON cannot hold; run.json has the rest
            logger.warning("preset.json was not written: %s", why)

    def _load(self) -> PreTrainedModel:
        return load_base(self._settled)

    def _evaluated(self, name: str, model: Any) -> EvaluationResult:
        """The evaluation of that name, from its folder if it is there."""
        folder = self._folder.evaluation / name
        if not (folder / "result.json").is_file():
            logger.info("Evaluating the %s model.", name)
        return evaluated(self._settled, model, name, folder)

    def _refuse_a_silent_judge(self, base: EvaluationResult) -> None:
        """A judge of whom nothing can be had is found out before the training, not after it.

        Raises:
            ForgeError: of all the answers that it was shown it judged none.
        """
        asked = [one for one in base.samples if one.was_judged]
        if asked and not base.judge_scores:
            shutil.rmtree(self._folder.evaluation / base.model)  # so that the next call asks again
            raise ForgeError(
                f"The judge gave no score for any of {len(asked)} answers; of the first: {asked[0].judge_error}. Mend "
                "that and run the same again, or set judge=None."
            )

    def _trained(self, model: PeftModel, tracked: TrackedRun) -> Trained:
        """Train, or load what was trained."""
        folder, kept = self._folder, self._folder.path / "training.json"
        if kept.is_file() and folder.adapter.is_dir():
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(model, load_peft_weights(str(folder.adapter), device=str(model.device)))
            found = json.loads(kept.read_text(encoding="utf-8"))
            return Trained(found["metrics"], tuple(found["notes"]), tuple(found["log"]))
        logger.info("Training.")
        trained = train(self._settled, model, folder, [*tracked.callbacks(), *self._callbacks])
        save_adapter(model, self._settled.tokenizer, folder.adapter)
        as_saved(model)
        write_json(kept, {"metrics": dict(trained.metrics), "notes": list(trained.notes), "log": list(trained.log)})
        if trained.asked_to_stop is not None:
            raise interruption(trained.asked_to_stop, f"The adapter is trained to its end, and in {folder.adapter}.")
        return trained

    def _result(self, base: EvaluationResult, tuned: EvaluationResult, trained: Trained) -> TuningResult:
        settled, folder = self._settled, self._folder
        comparison = compare_results(base, tuned)
        comparison.save(folder.evaluation)
        metrics = {
            **scores_of(tuned),
            **{f"base_{name}": value for name, value in scores_of(base).items()},
            **trained.metrics,
            "estimated_memory_gb": float(settled.estimate["total_estimated_gb"]),
        }
        record = settled.record
        notes = dict.fromkeys([*trained.notes, *page_notes(comparison.results)])
        result = TuningResult(settled.preset.name, record["params"], metrics, folder.path, tuple(notes))
        page(settled, result, comparison, trained.log).save(folder.report)
        write_card(settled, result, comparison)
        result.save()  # the last: what has it is over
        return result

    @contextmanager
    def _saying_where(self) -> Iterator[None]:
        """Whatever ends the run early, the log says what is saved and how to go on."""
        try:
            yield
        except TuningInterrupted:
            raise
        except BaseException as error:
            logger.warning(
                "The run ended early (%s). What is finished is in %s; run the same again, and it goes on there.",
                type(error).__name__,
                self._folder.path,
            )
            raise
