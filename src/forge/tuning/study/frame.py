"""The trials as a table for pandas, with the same columns and types however the study went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .reading import SCORES, TEXTS, StudyRecord

if TYPE_CHECKING:
    from pandas import DataFrame, Series  # type: ignore[import-untyped, unused-ignore]


def frame(study: StudyRecord) -> DataFrame:
    """A row for each trial, in order of number.

    | column | type | what |
    |---|---|---|
    | `number` | Int64 | of the trial |
    | `status` | string | "completed", "stopped", "diverged", "infeasible", "out_of_memory", "failed", "running" |
    | `params_NAME` | Int64, Float64, boolean or string | each setting |
    | `loss_25`, `loss_50`, `loss_100` | Float64 | held-out loss at the rungs |
    | `loss`, `value` | Float64 | held-out loss at the end; the study's own figure |
    | `bert_score`, `llm_judge_score`, `combined_score` | Float64 | where they were measured |
    | `steps`, `total_steps`, `tokens`, `seconds` | Int64, Float64 | what was spent |
    | `engine`, `prior`, `why`, `adapter`, `trace` | string | empty where there is nothing to say |

    >>> list(frame(StudyRecord("none", "minimize", ())).columns[:3])
    ['number', 'status', 'loss_25']
    """
    import pandas as pd

    trials = study.trials
    columns: dict[str, Any] = {
        "number": pd.Series([trial.number for trial in trials], dtype="Int64"),
        "status": pd.Series([trial.status for trial in trials], dtype="string"),
    }
    for name in study.parameters:
        columns[f"params_{name}"] = _setting([trial.params.get(name) for trial in trials])
    for percent in study.rungs:
        columns[f"loss_{percent}"] = pd.Series([trial.losses.get(percent) for trial in trials], dtype="Float64")
    for name in ("loss", "value"):
        columns[name] = pd.Series([getattr(trial, name) for trial in trials], dtype="Float64")
    for name in SCORES:
        columns[name] = pd.Series([trial.scores.get(name) for trial in trials], dtype="Float64")
    for name in ("steps", "total_steps", "tokens"):
        columns[name] = pd.Series([getattr(trial, name) for trial in trials], dtype="Int64")
    columns["seconds"] = pd.Series([trial.seconds for trial in trials], dtype="Float64")
    for name in TEXTS:
        columns[name] = pd.Series([trial.texts.get(name, "") for trial in trials], dtype="string")
    return pd.DataFrame(columns)


def _setting(values: list[Any]) -> Series:
    """One setting's column; whole numbers among others become floats, and what is no number becomes text."""
    import pandas as pd

    given = [value for value in values if value is not None]
    if given and all(isinstance(value, bool) for value in given):
        return pd.Series(values, dtype="boolean")
    if given and all(isinstance(value, int) and not isinstance(value, bool) for value in given):
        return pd.Series(values, dtype="Int64")
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given):
        return pd.Series([None if value is None else float(value) for value in values], dtype="Float64")
    return pd.Series([None if value is None else str(value) for value in values], dtype="string")
