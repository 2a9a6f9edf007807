"""A study as a person reads it: what was asked, what came of each trial. It needs no database once it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...reporting.private import without_credentials

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

RUNGS = (25, 50, 100)
SCORES = ("bert_score", "llm_judge_score", "combined_score")
TEXTS = ("engine", "prior", "why", "adapter", "trace")
FINISHED = ("completed", "stopped", "diverged", "infeasible", "out_of_memory", "failed")
# Of trials that forge did not finish itself, for example through optuna-dashboard.
_BY_STATE = {"COMPLETE": "completed", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class TrialRecord:
    """A trial.

    Args:
        number: of the trial.
        status: "completed", "stopped", "diverged", "infeasible", "out_of_memory" or "failed"; "running" or "waiting".
        params: as the study holds them.
        losses: held-out loss, in nats per token, by per cent of the trial's own steps.
        value: the study's figure; None where there is none.
        loss: held-out, at the end; None where the end was not reached.
        scores: of `SCORES`, those that were measured.
        steps: optimizer steps done.
        total_steps: of them.
        tokens: trained on.
        seconds: its share of its pack's time.
        texts: those of `TEXTS`; empty where there is nothing to say.
        crew: who trained it.
        curve: pairs of per cent and training loss.
        began: seconds since 1970; None for one that waits.
        ended: the same.
    """

    number: int
    status: str
    params: Mapping[str, Any]
    losses: Mapping[int, float]
    value: float | None = None
    loss: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    total_steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    crew: int | None = None
    curve: tuple[tuple[float, float], ...] = ()
    began: float | None = None
    ended: float | None = None

    @property
    def percent(self) -> int:
        """The last rung that it came to; 0 before the first."""
        return max(self.losses, default=0)

    @property
    def last_loss(self) -> float | None:
        """The held-out loss at the last rung."""
        return self.losses.get(self.percent)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**vars(self), "losses": {str(percent): loss for percent, loss in self.losses.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialRecord:
        """What `to_dict` gave."""
        losses = {int(percent): loss for percent, loss in values["losses"].items()}
        curve = tuple((point[0], point[1]) for point in values["curve"])
        return cls(**{**values, "losses": losses, "curve": curve})


@dataclass(frozen=True)
class StudyRecord:
    """A study.

    Args:
        name: of the study.
        direction: "minimize" or "maximize", of its values.
        trials: in order of number.
        base: figures of the model without an adapter: "loss", and those of `SCORES` that were measured.
        settings: what the study was begun with; `space` in it is what was searched, as Optuna writes distributions.
        rungs: per cent of the steps at which trials are held against each other.
        winner: number of the trial; None before the study is over.
        finalists: numbers.
        n_trials: how many are launched in all; None where nobody said so.
    """

    name: str
    direction: str
    trials: tuple[TrialRecord, ...]
    base: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rungs: tuple[int, ...] = RUNGS
    winner: int | None = None
    finalists: tuple[int, ...] = ()
    n_trials: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many trials there are of each status."""
        found = dict.fromkeys((*FINISHED, "running", "waiting"), 0)
        for trial in self.trials:
            found[trial.status] = found.get(trial.status, 0) + 1
        return {status: count for status, count in found.items() if count}

    @property
    def objective(self) -> str:
        """What decides: "loss", "bert_score" or "combined"."""
        return str(self.settings.get("objective") or "loss")

    @property
    def space(self) -> dict[str, dict[str, Any]]:
        """What was searched: for each parameter `low`, `high`, `log`, `step`, or `choices`; `{}` where nobody says."""
        found = self.settings.get("space")
        if not isinstance(found, Mapping):
            return {}
        said = {
            name: one.get("attributes", one) if isinstance(one, Mapping) else {"choices": [one]}
            for name, one in found.items()
        }
        return {name: dict(one) for name, one in said.items() if {"low", "choices"} & one.keys()}

    @property
    def parameters(self) -> list[str]:
        """What the trials set, in the order of the space."""
        return list(dict.fromkeys([*self.space, *(name for trial in self.trials for name in trial.params)]))

    def trial(self, number: int) -> TrialRecord:
        """The trial of that number."""
        return next(trial for trial in self.trials if trial.number == number)

    def value_of(self, trial: TrialRecord) -> float | None:
        """What decides, of one trial: the objective's figure; None where it was not measured."""
        if self.objective == "loss":
            return trial.loss
        key = "combined_score" if self.objective == "combined" else self.objective
        if (score := trial.scores.get(key)) is not None:
            return score
        return trial.value if self.direction == "maximize" and trial.status == "completed" else None

    def best(self) -> TrialRecord | None:
        """The winner; before there is one the best completed trial by the study's value."""
        if self.winner is not None:
            return self.trial(self.winner)
        sign = -1 if self.direction == "maximize" else 1
        done = [trial for trial in self.trials if trial.status == "completed" and trial.value is not None]
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def ranked(self) -> list[TrialRecord]:
        """The completed trials, smallest held-out loss first."""
        done = [trial for trial in self.trials if trial.status == "completed" and trial.loss is not None]
        return sorted(done, key=lambda trial: (trial.loss, trial.number))

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**vars(self), "trials": [trial.to_dict() for trial in self.trials]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudyRecord:
        """What `to_dict` gave."""
        trials = tuple(TrialRecord.from_dict(one) for one in values["trials"])
        lists = {name: tuple(values[name]) for name in ("rungs", "finalists")}
        return cls(**{**values, **lists, "trials": trials})


def read_study(study: Study, *, n_trials: int | None = None) -> StudyRecord:
    """Read Optuna's study.

    Args:
        study: whose attributes forge wrote; what is missing is left out.
        n_trials: how many are launched in all, where the study does not say so itself.

    >>> import optuna
    >>> study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    >>> study.add_trial(optuna.trial.create_trial(value=2.5, user_attrs={"status": "completed", "loss": 2.5}))
    >>> read_study(study).counts
    {'completed': 1}
    """
    attrs = study.user_attrs
    direction = study.direction.name.lower()
    base = {name: _number(attrs.get(f"base_{name}")) for name in ("loss", *SCORES)}
    return StudyRecord(
        study.study_name,
        direction,
        tuple(
            _read_trial(trial, attrs.get(f"scores:{trial.number}") or {}, maximize=direction == "maximize")
            for trial in study.get_trials(deepcopy=False)
        ),
        base={name: value for name, value in base.items() if value is not None},
        settings=attrs.get("settings") or {},
        rungs=tuple(attrs.get("rungs") or RUNGS),
        winner=attrs.get("winner"),
        finalists=tuple(attrs.get("finalists") or ()),
        n_trials=n_trials if n_trials is not None else attrs.get("n_trials"),
    )


def as_record(study: Study | StudyRecord, *, n_trials: int | None = None) -> StudyRecord:
    """The record of a study, which may be one already."""
    return study if isinstance(study, StudyRecord) else read_study(study, n_trials=n_trials)


def trained(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those on which tokens were spent, and that did not break on the way."""
    return [trial for trial in trials if trial.status in ("completed", "stopped", "diverged") and trial.tokens]


def _read_trial(trial: FrozenTrial, later: Mapping[str, Any], *, maximize: bool) -> TrialRecord:
    attrs = {**trial.user_attrs, **later}  # Optuna changes no attribute of a finished trial: scores may come later
    sign = -1.0 if maximize else 1.0
    losses = {step: sign * loss for step, loss in sorted(trial.intermediate_values.items()) if math.isfinite(loss)}
    status = _BY_STATE[trial.state.name]
    # The status is written a moment before the state.
    if trial.state.is_finished():
        status = str(attrs.get("status") or status)
    values = trial.values if status == "completed" else None
    value = _number(values[0]) if values else None
    loss = _number(attrs.get("loss"))
    if loss is None and status == "completed":
        loss = losses.get(100, None if maximize else value)
    scores = {name: _number(attrs.get(name)) for name in SCORES}
    return TrialRecord(
        trial.number,
        status,
        dict(trial.params),
        losses,
        value=value,
        loss=loss,
        scores={name: score for name, score in scores.items() if score is not None},
        steps=attrs.get("steps"),
        total_steps=attrs.get("total_steps"),
        tokens=attrs.get("tokens"),
        seconds=_number(attrs.get("seconds")),
        texts={name: without_credentials(str(attrs.get(name) or "")) for name in TEXTS},
        crew=attrs.get("crew"),
        curve=tuple((float(x), float(y)) for x, y in attrs.get("curve") or () if y is not None),
        began=trial.datetime_start.timestamp() if trial.datetime_start else None,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
    )


def _number(value: Any) -> float | None:
    """A finite number, or nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
