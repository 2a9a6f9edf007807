"""Rows of the GPU matrix -> Markdown: presets beside TRL's defaults, callbacks, freezing, memory (memory_report.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu import memory_report

Row = dict[str, Any]


def render(rows: Sequence[Row]) -> str:
    """The tables, with the machine and the versions that the rows name.

    >>> print(render([]))
    No rows yet: run `make gpu` on a machine with a CUDA device.
    """
    if not rows:
        return "No rows yet: run `make gpu` on a machine with a CUDA device."
    parts = ["# GPU matrix", *sorted({_provenance(row) for row in rows}), *_presets(rows), *_callbacks(rows)]
    parts += [*_freezing(rows), *_evaluation(rows), *_adapters(rows), *_tuning(rows)]
    parts += memory_report.parts(rows)
    if failed := [row for row in rows if row["status"] not in ("ok", "oom")]:
        parts.append("## Failed\n\n" + "\n".join(f"- `{r['key']}`: {r['status']}: {r['error'][:300]}" for r in failed))
    return "\n\n".join(parts)


def _provenance(row: Row) -> str:
    machine, versions = row["machine"], {name: found for name, found in row["versions"].items() if found}
    device = f"{machine['gpu']}, driver {machine.get('driver')}" if machine["gpu"] else machine["cpu"]
    return f"{device}; {row['date'][:10]}; " + ", ".join(f"{name} {found}" for name, found in versions.items())


def _presets(rows: Iterable[Row]) -> list[str]:
    pairs: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        s = row["settings"]
        if s.get("group") == "presets":
            pairs.setdefault((s["model"], s["preset"], s["micro_batch"], s["length"]), {})[s["by"]] = row
    if not pairs:
        return []
    head = ["model", "preset", "rows x tokens", "tokens/s", "TRL", "ratio", "step, s", "TRL"]
    head += ["allocated, GiB", "TRL", "ratio", "reserved, GiB", "TRL", "process, GiB", "TRL", "trained, M", "TRL"]
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for (model, preset, micro, length), pair in sorted(pairs.items(), key=lambda item: item[0][0]):
        mine, theirs = pair.get("forge"), pair.get("trl")
        cells = [model, preset, f"{micro} x {length}"]
        for name, ratio in (("tokens_per_s", True), ("step_s", False), ("max_allocated_gb", True)):
            cells += [_value(mine, name), _value(theirs, name)]
            cells += [_ratio(mine, theirs, name)] if ratio else []
        for name in ("max_reserved_gb", "nvml_process_gb", "trainable_parameters"):
            cells += [_value(mine, name), _value(theirs, name)]
        lines.append(_line(cells))
    note = (
        "Ratio is preset : TRL. Both run the same rows and lengths, but not the same work: TRL loads fp32, and PEFT's "
        "default trains q and v at rank 8 where the presets train every linear layer at 16 (last columns)."
    )
    return ["\n".join(["## Presets against TRL's defaults\n", *lines, "", note])]


def _callbacks(rows: Iterable[Row]) -> list[str]:
    """What callbacks add to a step, and the update of an average alone; empty without such rows."""
    mine = [row for row in rows if row["settings"].get("group") == "callbacks" and row["status"] == "ok"]
    steps = [_line(["model", "callbacks", "step, s", "overhead", "synchronised step, s", "overhead", "allocated, GiB"])]
    steps.append(_line(["---"] * 2 + ["---:"] * 5))
    updates = [_line(["weights", "average", "median, ms", "times forge's", "shadow", "after 3,000 updates"])]
    updates.append(_line(["---"] * 2 + ["---:"] * 2 + ["---"] * 2))
    for row in mine:
        s, result = row["settings"], row["result"]
        for name, found in result.get("variants", {}).items():
            cells = [s["model"], name, f"{found['flowing_step_s']:.4g}", f"{found['flowing_overhead']:+.2%}"]
            cells += [f"{found['step_s']:.4g}", f"{found['overhead']:+.2%}", f"{found['max_allocated_gb']:.2f}"]
            steps.append(_line(cells))
        for name, found in result.get("averages", {}).items():
            cells = [f"{s['shape']}, {s['dtype']}", name, f"{found['median_ms']:.3g}", f"{found['times_forge']:.2f}"]
            updates.append(_line([*cells, found["shadow"], found["after_3000"]]))
    parts = ["## Callbacks: their share of a LoRA step\n\n" + "\n".join(steps)] if len(steps) > 2 else []
    return parts + (["## One update of an average\n\n" + "\n".join(updates)] if len(updates) > 2 else [])


def _freezing(rows: Iterable[Row]) -> list[str]:
    """What a step costs with layers frozen; empty without such rows."""
    head = ["model", "rows x tokens", "variant", "step, s", "of all layers", "expected", "tokens/s", "allocated, GiB"]
    head += ["reserved, GiB", "process, GiB", "reading the cache"]
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for row in rows:
        s = row["settings"]
        if s.get("group") != "freezing" or row["status"] != "ok":
            continue
        for name, found in row["result"]["variants"].items():
            cells = [s["model"], f"{s['micro_batch']} x {s['length']}", name, f"{found['step_s']:.4g}"]
            cells += [f"{found['of_all']['median']:.3f}", f"{found['expected']:.3f}", f"{found['tokens_per_s']:,.0f}"]
            peaks = (found[peak] for peak in ("max_allocated_gb", "max_reserved_gb", "nvml_process_gb"))
            cells += ["n/a" if peak is None else f"{peak:.2f}" for peak in peaks]
            lines.append(_line([*cells, f"{found['read']:.2%}" if "read" in found else ""]))
    return ["## Freezing: a step's share of the all-layer step\n\n" + "\n".join(lines)] if len(lines) > 2 else []


def _evaluation(rows: Iterable[Row]) -> list[str]:
    """Answers and losses per second; empty without such rows."""
    lines = [_line(["model", "what", "tokens/s", "allocated, GiB", "differing answers"])]
    lines.append(_line(["---"] * 2 + ["---:"] * 3))
    for row in rows:
        s = row["settings"]
        if s.get("group") != "evaluation" or row["status"] != "ok":
            continue
        for name, found in row["result"].items():
            what = f"loss, rows of {s['length']}" if name == "loss" else f"answers, {name.replace('_', ' of ')}"
            peak = "n/a" if found["max_allocated_gb"] is None else f"{found['max_allocated_gb']:.2f}"
            differing = f"{found['differing']} of {s['prompts']}" if "differing" in found else ""
            lines.append(_line([s["model"], what, f"{found['tokens_per_s']:,.0f}", peak, differing]))
    return ["## Evaluation\n\n" + "\n".join(lines)] if len(lines) > 2 else []


def _adapters(rows: Iterable[Row]) -> list[str]:
    """What a row of adapters leaves behind; empty without such rows."""
    lines = [
        _line(
            ["model", "adapter", "by", "rounds", "weights as before", "growth, MiB", "hooks", "attach, s", "unload, s"]
        )
    ]
    lines.append(_line(["---"] * 3 + ["---:"] * 6))
    for row in rows:
        if row["settings"].get("group") != "adapters" or row["status"] != "ok":
            continue
        s, found = row["settings"], row["result"]
        growth = "n/a" if found["growth_mb"] is None else f"{found['growth_mb']:.1f}"
        hooks = f"{found['hooks'][0]} to {found['hooks'][1]}"
        cells = [s["model"], s["kind"], s["by"], str(s["rounds"]), "yes" if found["same"] else "no", growth, hooks]
        lines.append(_line([*cells, f"{found['attach_s']:.2f}", f"{found['unload_s']:.2f}"]))
    return ["## Adapters, one after another on one base\n\n" + "\n".join(lines)] if len(lines) > 2 else []


def _tuning(rows: Iterable[Row]) -> list[str]:
    """Whole runs of LoRATuner; empty without such rows."""
    lines = [_line(["model", "preset", "length", "estimated, GiB", "peak, GiB", "run, s", "of it training, s"])]
    lines.append(_line(["---"] * 2 + ["---:"] * 5))
    for row in rows:
        if row["settings"].get("group") != "tuning" or row["status"] != "ok":
            continue
        s, found = row["settings"], row["result"]
        peak = "n/a" if found["peak_gb"] is None else f"{found['peak_gb']:.2f} ({found['error']:+.1%})"
        cells = [s["model"], s["preset"], str(s["length"]), f"{found['estimated_gb']:.2f}", peak]
        lines.append(_line([*cells, f"{found['run_s']:.1f}", f"{found['train_s']:.1f}"]))
    return ["## Whole runs of LoRATuner\n\n" + "\n".join(lines)] if len(lines) > 2 else []


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _value(row: Row | None, name: str) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return {"oom": "out of memory"}.get(row["status"], row["status"])
    value = row["result"][name]
    if value is None:
        return "n/a"
    if name == "trainable_parameters":
        return f"{value / 1e6:,.3g}" if value < 1e9 else f"{value / 1e6:,.0f}"
    return f"{value:,.0f}" if name == "tokens_per_s" else f"{value:.3g}" if name == "step_s" else f"{value:.2f}"


def _ratio(mine: Row | None, theirs: Row | None, name: str) -> str:
    if not (mine and theirs and mine["status"] == theirs["status"] == "ok"):
        return ""
    a, b = mine["result"][name], theirs["result"][name]
    return f"{a / b:.2f}" if a is not None and b else "n/a"
