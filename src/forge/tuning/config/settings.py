"""Values for a config from where services keep them: the environment and requests."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...errors import ConflictError, ForgeError, UnknownNameError
from .files import parse_json
from .found import Found
from .project import dataset_of
from .rules import line

TRIALS_IN_A_REQUEST = (5, 100)

_BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _count(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError("it must be a whole number. Write 20, say.")
    return int(text)


def _number(text: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text) or math.isinf(float(text)):
        raise ValueError("it must be a number. Write 3 or 2e-4, say.")
    return float(text)


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"it must be one of {', '.join(_BOOLEANS)}, in capitals or not.")
    return _BOOLEANS[text.lower()]


VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "LORA_MODEL_NAME": ("model_name", str),
    "LORA_N_TRIALS": ("n_trials", _count),
    "LORA_NUM_EPOCHS": ("num_train_epochs", _number),
    "LORA_BATCH_SIZE": ("effective_batch_size", _count),
    "LORA_LEARNING_RATE": ("learning_rate", _number),
    "MLFLOW_ENABLED": ("mlflow_enabled", _boolean),
    "MLFLOW_TRACKING_URI": ("mlflow_tracking_uri", str),
    "MLFLOW_EXPERIMENT_NAME": ("mlflow_experiment_name", str),
}
"""By environment variable: the field, and how its text is read."""


def of_environment(environ: Mapping[str, str], *, skip: Collection[str]) -> Found:
    """What the environment says; blank variables say nothing.

    Args:
        environ: The variables.
        skip: Fields that something else decides; their variables are not read.
    """
    found = Found("TuningConfig from the environment")
    for variable, (name, parse) in VARIABLES.items():
        text = str(environ.get(variable, ""))
        if text.strip() and name not in skip:
            try:
                found.add(name, variable, parse(text.strip()), written=text)
            except ValueError as error:
                found.problems.append(line(variable, text, str(error)))
    return found


def of_request(
    request: Mapping[str, Any] | str | bytes,
    projects: Mapping[Any, str | os.PathLike[str]] | Callable[[int | str], Any] | None,
    *,
    look_up: bool = True,
) -> Found:
    """What a request says; see `TuningConfig.from_request`.

    Args:
        request: The request.
        projects: The folders of the projects.
        look_up: Whether the project's data are looked for.

    Raises:
        ConflictError: It is no request at all.
    """
    if not (projects is None or isinstance(projects, Mapping) or callable(projects)):
        raise ConflictError(f"projects is a {type(projects).__name__}: pass a mapping of project ids to folders.")
    found = Found("TuningConfig from a request")
    body = parse_json(request, "The request") if isinstance(request, (str, bytes)) else request
    if not isinstance(body, Mapping):
        raise ConflictError(
            f"The request is a {type(body).__name__}: pass a mapping with project_id and fine_tuning_params."
        )
    given = _known(body, "", ("project_id", "fine_tuning_params"), found)
    inner = given.get("fine_tuning_params", {})
    if not isinstance(inner, Mapping):
        why = "it must be an object. Pass {'n_trials': 20}, say."
        found.problems.append(line("fine_tuning_params", inner, why))
        inner = {}
    names = ("use_llm_judge", "judge_model_id", "base_model_name", "n_trials")
    params = _known(inner, "fine_tuning_params.", names, found)
    if "project_id" in given:
        found.add("project_id", "project_id", given["project_id"])
    if "project_id" in found.values and projects is not None and look_up:
        _add_data(found, projects)
    _add_params(found, params)
    return found


def _known(body: Mapping[Any, Any], path: str, names: tuple[str, ...], found: Found) -> dict[str, Any]:
    """What the request gives under these names; others are problems."""
    what = f"key of {path.rstrip('.') or 'a request'}"
    for key in body:
        if key not in names:
            short = str(key)[:60]
            found.problems.append(f"{path}{short!r}: {UnknownNameError.among(what, short, names)}")
    return {name: body[name] for name in names if body.get(name) is not None}


def _add_data(found: Found, projects: Any) -> None:
    project = found.values["project_id"]
    try:
        train, validation = dataset_of(project, projects)
    except ForgeError as error:
        found.problems.append(line("project_id", project, str(error)))
        return
    found.values["train_data"] = train
    if validation is not None:
        found.values["validation_data"] = validation


def _add_params(found: Found, params: Mapping[str, Any]) -> None:
    inside = "fine_tuning_params."
    name, trials, use, judge = (
        params.get(key) for key in ("base_model_name", "n_trials", "use_llm_judge", "judge_model_id")
    )
    if name is not None:
        found.add("model_name", f"{inside}base_model_name", name)
    if trials is not None:
        low, high = TRIALS_IN_A_REQUEST
        if not isinstance(trials, int) or not low <= trials <= high:  # True is 1, which is too few
            why = f"it must be a whole number from {low} to {high}. Pass 20, say."
            found.problems.append(line(f"{inside}n_trials", trials, why))
            found.given.add("n_trials")
        else:
            found.add("n_trials", f"{inside}n_trials", trials)
    if use is not None and not isinstance(use, bool):
        found.problems.append(line(f"{inside}use_llm_judge", use, "it must be true or false. Pass one of these."))
    if judge is not None and not isinstance(judge, str):
        why = "it must be the name of a judge, as text. Pass 'gemini', say."
        found.problems.append(line(f"{inside}judge_model_id", judge, why))
    elif use is False:
        found.add("judge", f"{inside}use_llm_judge", None)
    elif judge is not None:
        found.add("judge", f"{inside}judge_model_id", judge)
    elif use is True:
        found.add("judge", f"{inside}use_llm_judge", True)
