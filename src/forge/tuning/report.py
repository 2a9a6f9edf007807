"""The run on one page: what was done, what came of it, and how to go on from here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..reporting import Chart, Page, Series
from ..reporting.private import public

if TYPE_CHECKING:
    from ..evaluation import Comparison
    from .result import TuningResult
    from .settle import Settled

_ANSWERS = 8  # side by side, to get an idea; the evaluation's own report has more


def page(settled: Settled, result: TuningResult, comparison: Comparison, log: Sequence[Mapping[str, Any]]) -> Page:
    """The report of a run that is over."""
    record, base, tuned = settled.record, *comparison.results
    model = public(record["model"]["name"]) or record["model"]["type"]
    made = Page("Tuning report", f"{settled.preset.name} on {model}")
    made.facts(_facts(result, settled))
    for note in result.notes:
        made.notice(note, kind="note")
    made.heading("Is it better?")
    for line in comparison.conclusions():
        made.notice(line, kind="note")
    figures = comparison.figures()
    names = dict.fromkeys(name for one in figures for name in one)
    made.table(
        ("figure", *(one.model for one in comparison.results)),
        [(name, *(one.get(name, "-") for one in figures)) for name in names],
    )
    if charts := _charts(log):
        made.heading("Training")
        for chart in charts:
            made.chart(chart)
    if tuned.answered:
        made.heading("Answers, side by side")
        pairs = zip(base.answered, tuned.answered, strict=True)
        rows = [(one.question, one.reference or "", one.answer, two.answer) for one, two in list(pairs)[:_ANSWERS]]
        made.table(("question", "reference", "base", "tuned"), rows)
    made.heading("Recipe")
    choices = settled.preset.choices.items()
    made.table(
        ("setting", "value", "why", "source"), [(name, one.value, one.reason, one.source) for name, one in choices]
    )
    made.heading("Data")
    made.table(("side", "rows", "tokens", "learnt", "fingerprint"), _sides(settled))
    for line in (*settled.data.report.warnings, *settled.data.report.notes):
        made.notice(line, kind="note")
    made.heading("Environment")
    made.table(("what", "value"), [("seed", record["seed"]), *record["versions"].items()])
    made.heading("Go on from here")
    made.preformatted(_snippet(result, record["model"]["name"]))
    return made


def _facts(result: TuningResult, settled: Settled) -> dict[str, Any]:
    metrics = result.metrics
    facts = {"Held-out loss": f"{metrics['base_loss']:.3f} → {metrics['loss']:.3f}"}
    for name, key in (("BERTScore F1", "bert_score"), ("LLM judge", "llm_judge_score"), ("Combined", "combined_score")):
        if key == "combined_score" and "llm_judge_score" not in metrics:
            continue  # without a judge it is BERTScore once more
        if key in metrics and f"base_{key}" in metrics:
            facts[name] = f"{metrics[f'base_{key}']:.3g} → {metrics[key]:.3g}"
    facts["Steps"] = f"{metrics.get('steps', 0):.0f}"
    facts["Rows"] = f"{len(settled.data.train):,}"
    facts["Memory, estimated"] = f"{metrics['estimated_memory_gb']:.2f} GiB"
    if "peak_memory_gb" in metrics:
        facts["Memory, measured"] = f"{metrics['peak_memory_gb']:.2f} GiB"
    return facts


def _charts(log: Sequence[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    for title, keys in (("Loss", ("loss", "eval_loss")), ("Learning rate", ("learning_rate",))):
        series = []
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in log if isinstance(entry.get(key), (int, float))]
            if points:
                series.append(Series(key, [x for x, _ in points], [y for _, y in points]))
        if series:
            charts.append(Chart(title, tuple(series)))
    return charts


def _sides(settled: Settled) -> list[tuple[Any, ...]]:
    found = []
    for split in settled.data.report.splits:
        fingerprint = settled.record["data"][split.name]["fingerprint"]
        found.append((split.name, split.rows_out, split.tokens, f"{split.supervised_share:.0%}", fingerprint))
    return found


def _snippet(result: TuningResult, model: str) -> str:
    load = json.dumps(model or "the base model")
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({load})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(str(result.adapter_path))})"
    )
