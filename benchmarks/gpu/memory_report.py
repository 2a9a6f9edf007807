"""Rows of the memory group -> what the estimates are worth: errors, verdicts, and the peers' beside them.

Errors are (estimate - measured) / measured, so that a negative one promised too much room. Of a run that came through,
`allocated` and `reserved` are the peaks of torch's allocator and `process` is what the driver showed.

Whether a run fits on a card is known where it was tried (a cell with a `card`), and elsewhere only where it is sure: it
fits if the whole process was no larger than the card, it does not if the tensors and the context alone were larger.
Between the two the allocator might have got by with less; such pairs are left out and counted as open.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.reporting import Chart

Row = dict[str, Any]
MEASURED = {
    "allocated": ("max_allocated_gb", "allocated_peak_gb"),
    "reserved": ("max_reserved_gb", "reserved_peak_gb"),
    "process": ("nvml_process_gb", "total_estimated_gb"),
}
PEERS = ("fitcheck", "accelerate")
_COMMON = {"group", "model", "trainer", "method", "rows", "length", "held_out"}


def parts(rows: Iterable[Row]) -> list[str]:
    """The sections of the report; one line that says so where there are no rows."""
    mine = [row for row in rows if row["settings"].get("group") == "memory"]
    if not mine:
        return ["## Memory\n\nNo rows yet: run `python -m benchmarks.gpu --only group=memory` on a machine with CUDA."]
    came = sum(_measured(row, "allocated") is not None for row in mine)
    died = sum(row["status"] == "oom" for row in mine)
    title = f"## Memory: estimates against {came} measured runs, and {died} that ran out of memory"
    return [title, _summary(mine), _peers(mine), _verdicts(mine), _context(mine), _cells(mine)]


def chart(rows: Iterable[Row]) -> Chart | None:
    """Estimates over what the process took; None without rows that have both."""
    from forge.reporting import Chart, Series

    mine = [row for row in rows if row["settings"].get("group") == "memory" and _error(row, "process") is not None]
    mine.sort(key=lambda row: _measured(row, "process") or 0)
    if not mine:
        return None
    measured = [_measured(row, "process") or 0 for row in mine]
    lines = [Series("measured", measured, measured)]
    lines.append(Series("forge", measured, [_estimated(row, "process") or 0 for row in mine]))
    for peer in PEERS:
        said = [(x, total) for x, row in zip(measured, mine, strict=True) if (total := _peer(row, peer)) is not None]
        lines += [Series(peer, [x for x, _ in said], [total for _, total in said])] if said else []
    axes = {"x_label": "measured, GiB (whole process)", "y_label": "estimated, GiB"}
    return Chart("What training takes on the GPU", tuple(lines), **axes)


def _measured(row: Row, what: str) -> float | None:
    return row["result"].get(MEASURED[what][0]) if row["status"] == "ok" else None


def _found(row: Row) -> dict[str, Any]:
    """What the row knows, whether its run came through or not."""
    found: dict[str, Any] = row["result"] if row["status"] == "ok" else row.get("partial", {})
    return found


def _estimated(row: Row, what: str) -> float | None:
    return (_found(row).get("estimate") or {}).get(MEASURED[what][1])


def _peer(row: Row, name: str) -> float | None:
    return ((_found(row).get("peers") or {}).get(name) or {}).get("total_gb")


def _error(row: Row, what: str) -> float | None:
    return _ratio(_estimated(row, what), _measured(row, what))


def _ratio(estimated: float | None, measured: float | None) -> float | None:
    return estimated / measured - 1 if estimated is not None and measured else None


def _peer_error(row: Row, name: str) -> float | None:
    """Against what the peer speaks of: fitcheck of the process, accelerate of the tensors."""
    return _ratio(_peer(row, name), _measured(row, "process" if name == "fitcheck" else "allocated"))


def _summary(rows: Sequence[Row]) -> str:
    lines = [
        _line(["forge's error", "cells", "runs", "mean absolute", "mean", "worst low", "worst high", "in the band"])
    ]
    lines.append(_rule(2, 6))
    for what in MEASURED:
        for name, group in _halves(rows):
            lines.append(_line([what, name, *_errors([_error(row, what) for row in group]), _in_band(group, what)]))
    note = "No constant was fitted to a held-out cell: which ones they are follows from a hash of their settings."
    return "\n".join([*lines, "", note])


def _halves(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for name, held_out in (("to fit", False), ("held out", True)):
        yield name, [row for row in rows if row["settings"]["held_out"] == held_out]


def _errors(found: Sequence[float | None]) -> list[str]:
    """How many, mean absolute, mean, most negative and most positive."""
    errors = [error for error in found if error is not None]
    if not errors:
        return ["0", "", "", "", ""]
    signed = (statistics.mean(errors), min(errors), max(errors))
    return [str(len(errors)), f"{statistics.mean(map(abs, errors)):.1%}", *(f"{value:+.1%}" for value in signed)]


def _in_band(rows: Sequence[Row], what: str) -> str:
    """How often the process was between `low_gb` and `high_gb`."""
    if what != "process":
        return ""
    bands = [(_found(row)["estimate"], _measured(row, what)) for row in rows if _error(row, what) is not None]
    return (
        f"{sum(e['low_gb'] <= m <= e['high_gb'] for e, m in bands if m is not None)} of {len(bands)}" if bands else ""
    )


def _peers(rows: Sequence[Row]) -> str:
    lines = [_line(["peer", "of", "runs", "mean absolute", "mean", "worst low", "worst high", "forge on the same"])]
    lines.append(_rule(2, 6))
    for name in PEERS:
        for kind in ("training", "weights") if name == "accelerate" else (None,):
            mine = [row for row in rows if _peer_error(row, name) is not None and _kind(row, name) == kind]
            what = "process" if name == "fitcheck" else "allocated"
            own = [abs(error) for row in mine if (error := _error(row, what)) is not None]
            same = f"{statistics.mean(own):.1%}" if own else ""
            said = {None: "the process", "training": "training, all weights", "weights": "weights (no more is offered)"}
            lines.append(_line([name, said[kind], *_errors([_peer_error(row, name) for row in mine]), same]))
    reasons = Counter(reason for row in rows for name in PEERS if (reason := _why_not(row, name)))
    return "\n".join([*lines, "", *(f"- {count} x {reason}" for reason, count in reasons.most_common())])


def _kind(row: Row, name: str) -> str | None:
    kind: str | None = _found(row)["peers"][name].get("of")
    return kind


def _why_not(row: Row, name: str) -> str | None:
    said = (_found(row).get("peers") or {}).get(name) or {}
    for why in ("not_installed", "refused"):
        if why in said:
            return f"{name} {why.replace('_', ' ')}: {said[why][:160]}"
    return None


def _verdicts(rows: Sequence[Row]) -> str:
    """Of forge for every card, of fitcheck for the one that the cell ran on."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        for card, verdict in (_found(row).get("fits") or {}).items():
            _judge(counts, ("forge", _tried(row, card)), verdict, _truth(row, card))
        card = row["settings"].get("card", "H100")
        status = ((_found(row).get("peers") or {}).get("fitcheck") or {}).get("fits")
        verdict = {"safe": "yes", "does_not_fit": "no"}.get(status, status)
        if verdict is not None:
            _judge(counts, ("fitcheck", _tried(row, card)), verdict, _truth(row, card))
    head = ["fits?", "cards", "right", "uncertain", "wrong: said yes", "wrong: said no", "open"]
    lines = [_line(head), _rule(2, 5)]
    for (who, where), found in sorted(counts.items(), reverse=True):
        kinds = ("right", "uncertain", "yes", "no", "open")
        lines.append(_line([who, where, *(str(found[kind]) for kind in kinds)]))
    return "\n".join(lines)


def _tried(row: Row, card: str) -> str:
    return "tried" if row["settings"].get("card") == card else "from the measured size"


def _judge(counts: dict[tuple[str, str], Counter[str]], who: tuple[str, str], verdict: str, truth: bool | None) -> None:
    found = "open" if truth is None else "uncertain" if verdict == "uncertain" else verdict
    if truth is not None and found != "uncertain" and (verdict == "yes") == truth:
        found = "right"
    counts.setdefault(who, Counter())[found] += 1


def _truth(row: Row, card: str) -> bool | None:
    """Whether the run fits on the card, None where that is open."""
    from forge.memory.cards import find_card

    usable = find_card(card).usable_bytes / 2**30
    tried, device = row["settings"].get("card"), row["machine"].get("gpu_memory_gb") or 0
    if row["status"] == "oom":
        limit = find_card(tried).usable_bytes / 2**30 if tried else device
        return False if usable <= limit else None
    process, allocated = _measured(row, "process"), _measured(row, "allocated")
    if process is None or allocated is None:
        return None
    if process <= usable:
        return True
    context = (row["result"].get("context_gb") or {}).get("at_end") or 0
    return False if allocated + context > usable else None


def _context(rows: Sequence[Row]) -> str:
    """What the process holds beside the allocator: the constants to fit, from cells that are not held out."""
    lines = [_line(["beside the allocator, GiB", "runs", "median", "least", "most"]), _rule(1, 4)]
    for moment in ("after_init", "after_matmul", "at_end"):
        found = [_found(row).get("context_gb") or {} for row in rows if not row["settings"]["held_out"]]
        values = [each[moment] for each in found if each.get(moment) is not None]
        if values:
            numbers = (statistics.median(values), min(values), max(values))
            lines.append(_line([moment.replace("_", " "), str(len(values)), *(f"{value:.3f}" for value in numbers)]))
    return "\n".join(lines)


def _cells(rows: Sequence[Row]) -> str:
    head = ["model", "cell", "rows x tokens", "held out"]
    for what in MEASURED:
        head += [f"{what}, GiB", "forge"]
    head += ["fitcheck", "accelerate", "step, s", "estimate, s"]
    lines = [_line(head), _rule(4, len(head) - 4)]
    for row in rows:
        s, found = row["settings"], _found(row)
        own = ", ".join([s["trainer"], s["method"], *(f"{k} {s[k]}" for k in sorted(s.keys() - _COMMON))])
        cells = [s["model"], own, f"{s['rows']} x {s['length']}", "yes" if s["held_out"] else ""]
        for what in MEASURED:
            cells += [_gb(row, what), _signed(_error(row, what), _estimated(row, what))]
        cells += [_signed(_peer_error(row, name), _peer(row, name)) for name in PEERS]
        step = found.get("step_s")
        cells += [f"{step:.3g}" if step else "", f"{found['estimate_s']:.1f}" if "estimate_s" in found else ""]
        lines.append(_line(cells))
    note = "Estimates as errors, in GiB where there is nothing to compare with; accelerate's are of the tensors alone."
    return "\n".join([*lines, "", note])


def _gb(row: Row, what: str) -> str:
    if row["status"] != "ok":
        return {"oom": "out of memory"}.get(row["status"], row["status"])
    if "not_installed" in row["result"]:
        return f"no {row['result']['not_installed']}"
    value = _measured(row, what)
    return "n/a" if value is None else f"{value:.2f}"


def _signed(error: float | None, estimated: float | None) -> str:
    return f"{error:+.1%}" if error is not None else f"({estimated:.1f})" if estimated is not None else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(left: int, right: int) -> str:
    return _line(["---"] * left + ["---:"] * right)
