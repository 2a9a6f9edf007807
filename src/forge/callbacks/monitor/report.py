"""report.html and its plots, from a journal: after the run, and after a crash just as well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import journal

if TYPE_CHECKING:
    from ...presets import Preset
    from ...reporting import Chart

EVENTS = 20
"""As many events are written out; all of them are in the journal."""

# File name, title, unit, keys of the log (a trailing "/" takes all that begin so), and whether the axis is logarithmic.
_CHARTS: tuple[tuple[str, str, str, tuple[str, ...], bool], ...] = (
    ("loss", "Loss", "", ("loss", "eval_loss", "eval_"), False),
    ("learning_rate", "Learning rate", "", ("learning_rate",), False),
    ("gradient_norm", "Gradient norm before clipping", "", ("grad_norm",), True),
    ("gradient_groups", "Gradient norms by group", "", ("grad_norm/",), True),
    ("update_ratio", "Update-to-weight ratio", "", ("update_ratio",), True),
    ("throughput", "Tokens per second", "tokens / s", ("tokens_per_second",), False),
    ("shares", "Shares of the step", "", ("data_wait_share", "padding_share", "mfu"), False),
    (
        "memory",
        "Memory",
        "GiB",
        ("memory/peak_allocated_gb", "memory/peak_reserved_gb", "memory/process_rss_gb"),
        False,
    ),
    (
        "utilization",
        "Utilisation",
        "%",
        ("gpu/utilization_percent", "cpu/process_percent", "cpu/system_percent"),
        False,
    ),
    ("power", "GPU power", "W", ("gpu/power_w",), False),
)


_LABELS = {
    "nonfinite": "not finite",
    "flat_loss": "flat loss",
    "zero_gradient": "no gradient",
    "zero_learning_rate": "rate 0",
}


def write(folder: Path, *, preset: Preset | None = None, title: str = "Training report") -> Path:
    """Write `report.html` and one PNG a chart beside the folder's metrics.jsonl.

    Args:
        folder: The `report_dir`.
        preset: The recipe, shown with the reasons for its values.
        title: What the page is called.

    Returns:
        The page's path.
    """
    from ...reporting import Page

    entries = journal.read(folder / journal.FILE)
    events = [entry for entry in entries if "event" in entry]
    logs = [entry for entry in entries if "event" not in entry]
    final = logs[-1] if logs and "train_loss" in logs[-1] else None  # an earlier one is of a run that was resumed
    last = max((entry["step"] for entry in entries), default=0)
    page = Page(title, f"{last} steps" + ("" if final else ", not ended: it was stopped or is still running"))
    page.facts(_facts(logs, final))
    for event in events[:EVENTS]:
        page.notice(
            f"Step {event['step']}: {event['message']}", kind="error" if event["event"] == "nonfinite" else "warning"
        )
    if len(events) > EVENTS:
        page.text(f"and {len(events) - EVENTS} more, in {journal.FILE}")
    if not events:
        page.notice("No events: every loss and every gradient that was looked at was finite.", kind="good")
    page.heading("Curves")
    for name, chart in _charts(logs, events):
        chart.save(folder / f"{name}.png")
        page.chart(chart)
    if preset is not None:
        page.heading("Preset")
        page.text(f"{preset.name}, for {preset.hardware.name}")
        rows = [(name, choice.value, choice.reason, choice.source) for name, choice in preset.choices.items()]
        page.table(("setting", "value", "why", "source"), rows)
    page.heading("Log")
    page.table(*_table(logs))
    path = folder / "report.html"
    page.save(path)
    return path


def _facts(logs: list[dict[str, Any]], final: dict[str, Any] | None) -> dict[str, str]:
    facts = {}
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    if losses:
        facts["Training loss"] = f"{losses[0]:.4g} → {losses[-1]:.4g}"
    evaluated = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    if evaluated:
        facts["Held-out loss"] = f"{evaluated[0]:.4g} → {evaluated[-1]:.4g}"
        facts["Best held-out loss"] = f"{min(evaluated):.4g}"
    if final:
        facts["Time"] = duration(final["train_runtime"])
    for name, key, form in (
        ("Tokens per second", "tokens_per_second", "{:,.0f}"),
        ("MFU", "mfu", "{:.1%}"),
        ("Waiting for data", "data_wait_share", "{:.1%}"),
    ):
        if values := [entry[key] for entry in logs if key in entry]:
            facts[name] = form.format(sum(values) / len(values))
    for name, key in (
        ("Peak GPU memory", "memory/peak_allocated_gb"),
        ("Peak process memory", "memory/process_rss_gb"),
    ):
        if values := [entry[key] for entry in logs if key in entry]:
            facts[name] = f"{max(values):.2f} GiB"
    dropped = sum(entry.get("nonfinite_steps", 0) for entry in logs if "loss" in entry)
    if dropped:
        facts["Non-finite steps"] = f"{dropped:.0f}"
    return facts


def _charts(logs: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[tuple[str, Chart]]:
    from ...reporting import Chart, Series

    names = list(dict.fromkeys(name for entry in logs for name in entry))
    marks = tuple((float(entry["step"]), _LABELS.get(entry["event"], entry["event"])) for entry in events[:6])
    charts = []
    for file, title, unit, keys, log_y in _CHARTS:
        wanted = [name for key in keys for name in names if _matches(name, key)]
        series = []
        for name in dict.fromkeys(wanted):
            points = [(entry["step"], entry[name]) for entry in logs if isinstance(entry.get(name), int | float)]
            series.append(Series(name.removeprefix("grad_norm/"), [x for x, _ in points], [y for _, y in points]))
        if series:
            charts.append((file, Chart(title, tuple(series), y_label=unit, log_y=log_y, marks=marks)))
    return charts


def _matches(name: str, key: str) -> bool:
    if key == "eval_":  # one curve per evaluation set: eval_<set>_loss
        return name.startswith("eval_") and name.endswith("_loss")
    return name.startswith(key) if key.endswith("/") else name == key


def _table(logs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ["step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second", "nonfinite_steps"]
    shown = [entry for entry in logs if "loss" in entry or any(name.startswith("eval_") for name in entry)]
    if len(shown) > 200:
        every = math.ceil(len(shown) / 200)
        shown = shown[::every]
    columns = [name for name in columns if any(name in entry for entry in shown)]
    return columns, [[_cell(entry.get(name)) for name in columns] for entry in shown]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(3725), duration(75), duration(float("nan"))
    ('1:02:05', '1:15', '?')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
