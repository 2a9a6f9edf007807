"""A study on one page: what was searched, what won, what was stopped and why, and how far to believe it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...reporting import Page
from ...reporting.private import public
from .conclusions import conclusions, saved_share, tokens
from .reading import StudyRecord, TrialRecord
from .wording import SHORT, STATUS, duration, figure, settings_line

if TYPE_CHECKING:
    from .result import StudyResult

_ROWS = 200  # what a person reads, and a page that opens at once; trials.csv has all of them
_WHY = 50
_TRACES = 3
_TRACE_LINES = 12
_HOW = ("sampler", "seed", "engine", "pack", "score_every_trial", "finalists", "num_train_epochs", "max_length")


def page(result: StudyResult) -> Page:
    """The report of a study that is over."""
    study, best = result.study, result.best
    made = Page("Study report", f"{len(study.trials)} trials around {result.preset}{_of_model(study)}")
    made.facts(_facts(study, best))
    for note in result.notes:
        made.notice(public(note), kind="note")
    made.heading("What may be concluded")
    for line in conclusions(study):
        made.notice(public(line), kind="note")
    made.heading("The winner")
    made.table(("setting", "value"), [(name, public(figure(value))) for name, value in result.best_params.items()])
    made.preformatted(snippet(result))
    if finalists := [trial for trial in study.ranked() if trial.number in study.finalists]:
        made.heading("The finalists")
        made.table(*_finalists(study, finalists))
    made.heading("Charts")
    for plot in result.charts.values():
        made.chart(plot)
    made.heading("What was searched")
    made.table(("setting", "from", "to", "scale"), _space(study))
    made.heading("Trials")
    if len(study.trials) > _ROWS:
        made.text(f"The first {_ROWS} of {len(study.trials)}; trials.csv has them all.")
    made.table(*_trials(study))
    _ends(made, study)
    made.heading("How it was run")
    made.table(("what", "value"), _run(study, result.preset))
    return made


def snippet(result: StudyResult) -> str:
    """Lines that make the winner's recipe, to be pasted."""
    params = {name: public(value) if isinstance(value, str) else value for name, value in result.best_params.items()}
    elsewhere = {name: params.pop(name) for name in ("freeze_ratio",) if name in params}
    said = ", ".join(f"{name}={value!r}" for name, value in params.items())
    lines = ["from forge import get_preset", "", f"preset = get_preset({json.dumps(result.preset)}, {said})"]
    if elsewhere.get("freeze_ratio"):
        lines += ["", f"# setup_lp_lora_style(model, freeze_ratio={elsewhere['freeze_ratio']!r})"]
    return "\n".join(lines)


def _of_model(study: StudyRecord) -> str:
    model = study.settings.get("model")
    name = model.get("name") or model.get("type") if isinstance(model, Mapping) else model
    shown = public(str(name)) if name else ""
    return f" on {shown}" if shown else ""


def _facts(study: StudyRecord, best: TrialRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    base = study.base.get("loss")
    if best.loss is not None:
        facts["Held-out loss"] = f"{base:.3f} → {best.loss:.3f}" if base is not None else f"{best.loss:.3f}"
    names = (("BERTScore F1", "bert_score"), ("LLM judge", "llm_judge_score"), ("Combined", "combined_score"))
    for label, key in names:
        if key == "combined_score" and study.objective != "combined":
            continue
        if key in best.scores:
            before = f"{study.base[key]:.3g} → " if key in study.base else ""
            facts[label] = f"{before}{best.scores[key]:.3g}"
    counts = study.counts
    facts["Winner"] = f"trial {best.number}"
    facts["Trials"] = len(study.trials) if study.n_trials is None else f"{len(study.trials)} of {study.n_trials}"
    facts["Completed, stopped"] = f"{counts.get('completed', 0)}, {counts.get('stopped', 0)}"
    spent, whole = tokens(study)
    if whole:
        facts["Training tokens"] = f"{spent:,}"
        facts["Saved by stopping"] = f"{saved_share(study):.0%}"
    if spans := [trial.seconds for trial in study.trials if trial.seconds is not None]:
        facts["Training time"] = duration(sum(spans))
    return facts


def _finalists(study: StudyRecord, finalists: Sequence[TrialRecord]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    scores = [
        name
        for name in ("bert_score", "llm_judge_score", "combined_score")
        if any(name in one.scores for one in finalists)
    ]
    rows = [
        (
            f"{trial.number}{' (winner)' if trial.number == study.winner else ''}",
            settings_line(trial.params, most=4),
            _loss(trial.loss),
            *(f"{trial.scores[name]:.4g}" if name in trial.scores else "" for name in scores),
        )
        for trial in finalists
    ]
    return ("trial", "settings", "held-out loss", *(name.replace("_", " ") for name in scores)), rows


def _space(study: StudyRecord) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, said in study.space.items():
        if "choices" in said:
            rows.append((name, public(", ".join(map(figure, said["choices"]))), "", "choices"))
        else:
            rows.append((name, figure(said["low"]), figure(said["high"]), "log" if said.get("log") else "linear"))
    return rows


def _trials(study: StudyRecord) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    best = study.best()
    names = study.parameters
    header = ("trial", "became", *(SHORT.get(name, name) for name in names))
    header += (*(f"{percent}%" for percent in study.rungs), "tokens")
    scored = any(study.value_of(trial) is not None for trial in study.trials) and study.objective != "loss"
    header += (study.objective.replace("_", " "),) if scored else ()
    rows = []
    for trial in study.trials[:_ROWS]:
        row: tuple[Any, ...] = (trial.number, "winner" if trial is best else STATUS.get(trial.status, trial.status))
        row += tuple(public(figure(trial.params[name])) if name in trial.params else "" for name in names)
        row += tuple(_loss(trial.losses.get(percent)) for percent in study.rungs)
        row += (f"{trial.tokens:,}" if trial.tokens else "",)
        row += (_loss(study.value_of(trial)),) if scored else ()
        rows.append(row)
    return header, rows


def _ends(made: Page, study: StudyRecord) -> None:
    """What did not come to its end, and why."""
    ends = (
        ("Stopped on evidence", ("stopped",)),
        ("Diverged", ("diverged",)),
        ("Too big for the memory", ("infeasible", "out_of_memory")),
        ("Failed", ("failed",)),
    )
    for title, statuses in ends:
        found = [trial for trial in study.trials if trial.status in statuses]
        if not found:
            continue
        made.heading(f"{title}: {len(found)}")
        if len(found) > _WHY:
            made.text(f"The first {_WHY}; trials.csv has them all.")
        rows = [
            (trial.number, settings_line(trial.params, most=3), public(trial.texts.get("why", "")) or "no reason given")
            for trial in found[:_WHY]
        ]
        made.table(("trial", "settings", "why"), rows)
        _traces(made, found)


def _traces(made: Page, found: Sequence[TrialRecord]) -> None:
    """The ends of a few different traces: the rest is mostly the same, and lies in trials.csv."""
    shown: dict[str, list[int]] = {}
    for trial in found:
        if trace := trial.texts.get("trace", "").strip():
            shown.setdefault("\n".join(_short(trace)), []).append(trial.number)
    for trace, numbers in list(shown.items())[:_TRACES]:
        made.text(f"Trial {', '.join(map(str, numbers))}:")
        made.preformatted(trace)


def _short(trace: str) -> list[str]:
    lines = [public(line) for line in trace.splitlines()]
    left_out = len(lines) - _TRACE_LINES
    return lines if left_out <= 0 else [f"({left_out} lines left out)", *lines[-_TRACE_LINES:]]


def _run(study: StudyRecord, preset: str) -> list[tuple[str, str]]:
    settings = study.settings
    config = settings.get("config") if isinstance(settings.get("config"), Mapping) else {}
    rows = [("preset", preset), ("objective", study.objective)]
    rows += [
        (name, figure(value)) for name in _HOW if (value := settings.get(name, (config or {}).get(name))) is not None
    ]
    rows.append(("rungs", ", ".join(f"{percent}%" for percent in study.rungs)))
    engines = sorted({trial.texts["engine"] for trial in study.trials if trial.texts.get("engine")})
    rows += [("engines that trained", ", ".join(engines))] if engines else []
    crews = {trial.crew for trial in study.trials if trial.crew is not None}
    rows += [("workers", str(len(crews)))] if crews else []
    priors = [f"{trial.texts['prior']} (trial {trial.number})" for trial in study.trials if trial.texts.get("prior")]
    rows += [("begun with", ", ".join(priors))] if priors else []
    versions = settings.get("versions")
    rows += list(versions.items()) if isinstance(versions, Mapping) else []
    return [(name, public(str(value))) for name, value in rows]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
