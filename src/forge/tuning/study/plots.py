"""A study in pictures: what came when, which settings matter, what each did, how the trials learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...reporting.charts import INK, PALETTE, RED, _style, _text
from .drawing import Plot, filled, finish, hollow, keep_window, level, log_ticks, pairs, wider
from .importance import importances
from .reading import StudyRecord, TrialRecord
from .wording import SHORT, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = PALETTE[0], PALETTE[1], PALETTE[2]
PALE = "#9ca3af"
_SCORES = {"bert_score": "BERTScore F1", "combined": "combined score"}
_SHADES = ((25, "#b9c0ca", "after 25%"), (50, "#74acd5", "after 50%"), (100, BLUE, "at the end"))


def study_plots(study: StudyRecord) -> dict[str, Plot]:
    """All pictures of a study, by name.

    >>> sorted(study_plots(StudyRecord("none", "minimize", ())))
    ['history', 'importance', 'learning_curves']
    """
    found = {"history": history(study), "learning_curves": learning_curves(study), "importance": importance(study)}
    return {**found, **{f"slice_{name}": slice_of(study, name) for name in study.parameters}}


def history(study: StudyRecord) -> Plot:
    """The figure of each trial in the order in which they were asked for, and the best so far."""
    scored = study.direction == "maximize"
    what = _SCORES.get(study.objective, "score") if scored else "held-out loss"
    done, stopped, broken = [], [], []
    for trial in study.trials:
        value = trial.value if scored else trial.loss
        if trial.status == "completed" and value is not None:
            done.append((trial.number, value))
        elif trial.status == "stopped" and trial.last_loss is not None and not scored:
            stopped.append((trial.number, trial.last_loss))
        elif trial.status not in ("running", "waiting"):
            broken.append(trial.number)
    title = f"History: {what} by trial"
    if not study.trials:
        return Plot(title, words="No trial yet.")
    better = max if scored else min
    best: list[float] = []
    for _, value in done:
        best.append(better(value, best[-1]) if best else value)
    words = f"{len(done)} completed, best {best[-1]:.4g}." if best else "None completed."

    def draw(axes: Axes) -> None:
        last = study.trials[-1].number
        if stopped:
            axes.plot(*pairs(stopped), label="stopped (last rung)", color=PALE, **hollow())
        if done:
            axes.step(
                [*(x for x, _ in done), last],
                [*best, best[-1]],
                where="post",
                color=ORANGE,
                lw=1.4,
                label="best so far",
            )
            axes.plot(*pairs(done), label="completed", color=BLUE, **filled())
        if not scored and (base := study.base.get("loss")) is not None:
            level(axes, base, "base")
        keep_window(axes, [y for _, y in [*done, *stopped]])
        if broken:
            label = "never scored" if scored else "diverged, failed, too big"
            style: dict[str, Any] = {"marker": "x", "ms": 4.5, "mew": 1.4, "ls": "none", "clip_on": False, "zorder": 4}
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.06 * (high - low), high)  # a row of its own
            axes.plot(
                broken, [0.02] * len(broken), transform=axes.get_xaxis_transform(), color=RED, label=label, **style
            )
        axes.set_xlim(-0.6, max(last, 1) + 0.6)
        finish(axes, "trial", what, whole_x=True)

    return Plot(title, words=words, draw=draw)


def learning_curves(study: StudyRecord) -> Plot:
    """The held-out loss of each trial at the rungs."""
    lines = [trial for trial in study.trials if trial.losses]
    title = "Held-out loss at the rungs"
    if not lines:
        return Plot(title, words="No trial has come to a rung yet.")
    winner = study.best()
    words = f"{len(lines)} trials" + (f", the winner is trial {winner.number}." if winner else ".")

    def draw(axes: Axes) -> None:
        base = study.base.get("loss")
        labelled = set()
        for trial in lines:
            kind = (
                "completed" if trial.status == "completed" else "on the way" if trial.status == "running" else "stopped"
            )
            color = {"completed": BLUE, "on the way": GREEN, "stopped": PALE}[kind]
            faint = 0.85 if len(lines) < 30 else 0.5
            if trial is winner:
                kind, color, faint = f"winner: trial {trial.number}", ORANGE, 1.0
            x, y = list(trial.losses), list(trial.losses.values())
            label = kind if kind not in labelled else None
            labelled.add(kind)
            wide = 2.2 if trial is winner else 1.0
            axes.plot(x, y, "o-", color=color, lw=wide, ms=3.4, alpha=faint, label=label, zorder=3 if wide > 2 else 2)
        if base is not None:
            level(axes, base, "base")
        keep_window(axes, [loss for trial in lines for loss in trial.losses.values()])
        axes.set_xlim(min(study.rungs) - 4, max(study.rungs) + 4)
        finish(axes, "% of the trial's steps", "held-out loss", whole_x=True)
        axes.set_xticks(study.rungs, [f"{percent}%" for percent in study.rungs])

    return Plot(title, words=words, draw=draw)


def importance(study: StudyRecord) -> Plot:
    """Which settings made the difference."""
    found, basis = importances(study)
    title = "Importance of the settings"
    if not found:
        return Plot(title, words=basis)
    names = list(reversed(found))
    words = f"{basis}. " + ", ".join(f"{SHORT.get(name, name)} {value:.0%}" for name, value in found.items()) + "."

    def draw(axes: Axes) -> None:
        values = [found[name] for name in names]
        axes.barh(range(len(names)), values, color=BLUE, height=0.62)
        for place, value in enumerate(values):
            text: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{value:.0%}", (value, place), **text, **_style(8.5, INK))
        finish(axes, f"share (PED-ANOVA; {basis})", "", whole_x=False, legend=False)
        axes.set_yticks(range(len(names)), [_text(SHORT.get(name, name), 8.5, 110)[0] for name in names])
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max(max(values) * 1.14, 0.1))
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")

    return Plot(title, words=words, draw=draw)


def slice_of(study: StudyRecord, name: str) -> Plot:
    """What each value of one setting led to."""
    shown = [trial for trial in study.trials if name in trial.params and trial.last_loss is not None]
    title = f"Held-out loss by {name}"
    if not shown:
        return Plot(title, words="No trial has come to a rung yet.")
    numeric = all(_is_number(trial.params[name]) for trial in shown) and "choices" not in study.space.get(name, {})
    values = [trial.params[name] for trial in shown]
    choices = [] if numeric else _choices(study, name, values)
    winner = study.best()
    words = f"{len(shown)} trials at {len({repr(value) for value in values})} values of {name}."

    def draw(axes: Axes) -> None:
        for percent, color, label in _SHADES:
            points = [trial for trial in shown if trial.percent == percent]
            x = [_place(trial, name, choices) for trial in points]
            if points:
                axes.plot(x, [trial.losses[percent] for trial in points], label=label, color=color, **filled())
        if winner is not None and winner in shown:
            at = ([_place(winner, name, choices)], [winner.losses[winner.percent]])
            axes.plot(*at, label="winner", color=ORANGE, marker="o", ms=9, mfc="none", mew=1.8, ls="none", zorder=4)
        if numeric and _is_log(study, name):
            axes.set_xscale("log")
        if numeric and (said := study.space.get(name)):  # all that was searched: a winner at its edge is seen there
            axes.set_xlim(*wider(min(said["low"], *values), max(said["high"], *values), log=_is_log(study, name)))
        keep_window(axes, [trial.last_loss for trial in shown if trial.last_loss is not None])
        finish(axes, name, "held-out loss", whole_x=all(isinstance(value, int) for value in values) and numeric)
        if choices:
            axes.set_xticks(range(len(choices)), [_text(figure(one), 8.5, 320 / len(choices))[0] for one in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif axes.get_xscale() == "log":
            log_ticks(axes)

    return Plot(title, words=words, draw=draw)


def _choices(study: StudyRecord, name: str, values: Sequence[Any]) -> list[Any]:
    """What could be chosen, numbers in order."""
    found = {repr(one): one for one in [*study.space.get(name, {}).get("choices", []), *values]}
    return sorted(found.values(), key=lambda one: (not _is_number(one), one if _is_number(one) else str(one)))


def _place(trial: TrialRecord, name: str, choices: Sequence[Any]) -> float:
    """Where a trial stands; side by side where many made the same choice, the same way in every picture."""
    value = trial.params[name]
    if not choices:
        return float(value)
    return list(map(repr, choices)).index(repr(value)) + ((trial.number * 7) % 11 - 5) * 0.03


def _is_log(study: StudyRecord, name: str) -> bool:
    said = study.space.get(name)
    return bool(said.get("log")) if said else name == "learning_rate"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
