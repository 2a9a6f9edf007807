"""A search as lines of a log: one for each thing that happens to a trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .reading import SCORES, TrialRecord
from .wording import settings_line


def trial_line(trial: TrialRecord) -> str:
    """What there is to say of a trial now.

    >>> params, why = {"learning_rate": 2.1e-4, "lora_r": 16}, {"why": "3 of 4 were better."}
    >>> trial_line(TrialRecord(7, "stopped", params, {25: 2.52, 50: 2.315}, texts=why))
    'Trial 7 (lr 2.1e-4, r 16): held-out loss 2.315 at 50%, stopped: 3 of 4 were better.'
    """
    figures = {**trial.scores, **({"loss": trial.loss} if trial.loss is not None else {})}
    if trial.status == "running" and not trial.losses:
        return begun_line(trial.number, trial.params, trial.texts.get("prior", ""))
    loss = f"held-out loss {trial.last_loss:.4g} at {trial.percent}%" if trial.last_loss is not None else ""
    if trial.status == "running":
        return f"{_who(trial.number, trial.params)}: {loss}, goes on"
    return ended_line(trial.number, trial.params, trial.status, {**figures, **trial.texts}, at=loss)


def begun_line(number: int, params: Mapping[str, Any], prior: str = "") -> str:
    """A trial begins."""
    return f"{_who(number, params, most=6)} begins{f', from the prior {prior!r}' if prior else ''}"


def ended_line(number: int, params: Mapping[str, Any], status: str, said: Mapping[str, Any], *, at: str = "") -> str:
    """A trial is over.

    Args:
        number: of the trial.
        params: its settings.
        status: what became of it.
        said: its attributes: the scores, `loss` and `why` are told.
        at: how far it came, in words.
    """
    figures = [f"held-out loss {said['loss']:.4g}"] if _is_number(said.get("loss")) else [at] * bool(at)
    figures += [f"{name.replace('_', ' ')} {said[name]:.4g}" for name in SCORES if _is_number(said.get(name))]
    why = str(said.get("why") or "").strip()
    end = f"{status.replace('_', ' ')}{f': {why}' if why and status != 'completed' else ''}"
    return f"{_who(number, params)}: {', '.join([*figures, end])}"


def _who(number: int, params: Mapping[str, Any], *, most: int = 2) -> str:
    settings = settings_line(params, most=most)
    return f"Trial {number} ({settings})" if settings else f"Trial {number}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
