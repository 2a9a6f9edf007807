"""What a search leaves behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ForgeError
from ...reporting import Table
from ...reporting.charts import write_whole
from .conclusions import conclusions
from .reading import StudyRecord, TrialRecord, as_record
from .wording import STATUS, figure

if TYPE_CHECKING:
    from optuna import Study
    from pandas import DataFrame  # type: ignore[import-untyped, unused-ignore]

    from .drawing import Plot

FILE, TRIALS, PLOTS, REPORT = "study.json", "trials.csv", "plots", "report.html"
FORMAT = 1
_LABELS = {
    "loss": "held-out loss",
    "bert_score": "BERTScore F1",
    "llm_judge_score": "LLM judge",
    "combined_score": "combined score",
}


@dataclass(frozen=True)
class StudyResult:
    """What `BayesianLoRATuner.run` returns.

        result = BayesianLoRATuner("Qwen/Qwen3-0.6B", "chats.jsonl", n_trials=20).run()
        result.print()
        preset = get_preset(result.preset, **result.best_params)
        PeftModel.from_pretrained(base, result.best_adapter_path)

    Args:
        study: all that was tried.
        preset: the name of the recipe that was searched around.
        best_params: the winner's settings: `get_preset(result.preset, **result.best_params)` is its recipe.
        run_dir: the study's folder.
        notes: what a reader should know before believing the numbers.
    """

    study: StudyRecord
    preset: str
    best_params: Mapping[str, Any]
    run_dir: Path
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        study: Study | StudyRecord,
        run_dir: str | os.PathLike[str],
        *,
        preset: str = "qlora",
        best_params: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
    ) -> StudyResult:
        """The result of a study that is over.

        Args:
            study: Optuna's, or what was read of it.
            run_dir: its folder.
            preset: the name of the recipe.
            best_params: the winner's, in the preset's vocabulary; without them those that the study holds.
            notes: what a reader should know.

        Raises:
            ForgeError: no trial was completed.
        """
        record = as_record(study)
        # A prior that no trial was left for is none.
        record = replace(record, trials=tuple(trial for trial in record.trials if trial.status != "waiting"))
        best = record.best()
        if best is None:
            raise ForgeError(
                f"The study {record.name!r} has no completed trial ({_became(record) or 'no trial at all'}), so "
                "it has no winner. Run it again to go on; raise n_trials if they are spent."
            )
        params = dict(best.params if best_params is None else best_params)
        return cls(record, preset, params, Path(run_dir).expanduser().absolute(), tuple(notes))

    @property
    def objective(self) -> str:
        """What chose the winner: "loss", "bert_score" or "combined"."""
        return self.study.objective

    @property
    def best(self) -> TrialRecord:
        """The winner."""
        found = self.study.best()
        if found is None:
            raise ForgeError(f"The study {self.study.name!r} has no completed trial, so it has no winner.")
        return found

    @property
    def best_trial(self) -> int:
        """The winner's number."""
        return self.best.number

    @property
    def best_value(self) -> float:
        """The winner's figure under the objective; the study's own value where it was not measured."""
        value = self.study.value_of(self.best)
        value = self.best.value if value is None else value
        return float("nan") if value is None else value

    @property
    def best_adapter_path(self) -> Path:
        """The folder of the winner's adapter, for `PeftModel.from_pretrained(base, path)`."""
        return self.run_dir / (self.best.texts.get("adapter") or "adapter")

    @property
    def base(self) -> Mapping[str, float]:
        """Figures of the model without an adapter: "loss", and the scores that were measured."""
        return self.study.base

    @cached_property
    def trials(self) -> DataFrame:
        """A row for each trial: its settings, its losses at the rungs, what became of it, what it took."""
        from .frame import frame

        return frame(self.study)

    @property
    def report_path(self) -> Path:
        """The page that says what was searched, found, and may be concluded."""
        return self.run_dir / REPORT

    def conclusions(self) -> list[str]:
        """What may be concluded, sentence by sentence."""
        return conclusions(self.study)

    @cached_property
    def charts(self) -> dict[str, Plot]:
        """The pictures by name, for a notebook or another page."""
        from .plots import study_plots

        return study_plots(self.study)

    def plots(self) -> dict[str, Path]:
        """Draw the study.

        Returns:
            The PNG files by name: "history", "importance", "learning_curves", and "slice_NAME" for each parameter.
        """
        folder = self.run_dir / PLOTS
        folder.mkdir(parents=True, exist_ok=True)
        found = {}
        for name, plot in self.charts.items():
            found[name] = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"
            plot.save(found[name])
        return found

    def save(self) -> None:
        """Write `study.json`, which `load` reads, `trials.csv` for other programs, the plots and the report."""
        from .study_report import page

        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self.run_dir / TRIALS, self.trials.to_csv(index=False).encode("utf-8", "replace"))
        self.plots()
        page(self).save(self.report_path)
        said = {
            "format": FORMAT,
            "preset": self.preset,
            "best_params": dict(self.best_params),
            "notes": list(self.notes),
            "study": self.study.to_dict(),
        }
        # Last: a folder that has it has the rest.
        write_whole(self.run_dir / FILE, json.dumps(said, indent=1, ensure_ascii=False).encode("utf-8", "replace"))

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> StudyResult:
        """The result of a study that is over; its database is not needed.

        Args:
            run_dir: the study's folder.

        Raises:
            ForgeError: the folder holds no result.
        """
        folder = Path(run_dir).expanduser().absolute()
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ForgeError(
                    f"{folder / FILE} was written in format {found['format']}, and this forge reads {FORMAT}. "
                    "Load it with the version that wrote it, or run the study again: it goes on from its database."
                )
            study = StudyRecord.from_dict(found["study"])
            return cls(study, found["preset"], found["best_params"], folder, tuple(found["notes"]))
        except FileNotFoundError:
            begun = any(folder.glob("*.db"))
            went = "its study is not over: run it again, and it goes on" if begun else "no study is there"
            raise ForgeError(f"{folder} holds no result; {went}.") from None
        except ForgeError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ForgeError(f"{folder / FILE} is not the result of a study ({error}).") from error

    def print(self) -> None:
        """Print the winner, what may be concluded, and where things are."""
        self._table().print()

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        return (
            f"StudyResult({self.study.name!r}, trials={len(self.study.trials)}, best_trial={self.best_trial}, "
            f"{self.objective}={self.best_value:.4g})"
        )

    def _table(self) -> Table:
        best = self.best
        table = Table(("what", "base", f"trial {best.number}"), title=f"Searched around {self.preset!r}")
        for key, label in _LABELS.items():
            before = self.base.get(key)
            after = best.loss if key == "loss" else best.scores.get(key)
            if key == "combined_score" and self.objective != "combined":
                continue
            if before is not None or after is not None:
                table.add(label, *("-" if one is None else f"{one:.4g}" for one in (before, after)))
        table.section("its settings")
        for name, value in self.best_params.items():
            table.add(name, "", figure(value))
        where = f"adapter: {self.best_adapter_path}\nreport: {self.report_path}"
        table.footer = "\n".join([*self.conclusions(), *self.notes, where])
        return table


def _became(study: StudyRecord) -> str:
    return ", ".join(f"{number} {STATUS.get(status, status)}" for status, number in study.counts.items())
