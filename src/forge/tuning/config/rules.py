"""What each field of a `TuningConfig` may hold."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ...errors import ForgeError, UnknownNameError
from ...evaluation.judges import Judge, list_judges
from ...memory.cards import find_card
from ...presets.method import PRESETS
from .values import FrozenMapping, shown

TRACKERS = ("wandb", "tensorboard", "trackio")
"""What `report_to` passes to the trainer."""
MERGED = ("learning_rate", "num_train_epochs", "effective_batch_size", "max_length")
"""Fields that are settings of the preset too."""
LARGEST_SEED = 2**32 - 1
_EXAMPLE_JUDGE = "@register_judge('mine') def mine(): return get_judge('openai', model='...')"


@dataclass(frozen=True)
class Rule:
    """What a field may hold.

    Args:
        read: Gives the value as it is kept; raises TypeError or ValueError where it will not do, and a ForgeError where
            it has more to say than the rule.
        says: The rule, after "it must be".
        remedy: What to do, as a sentence.
        words: Whether "on", "off", "yes" and "no" mean True and False, where they are not quoted.
    """

    read: Callable[[Any], Any]
    says: str
    remedy: str
    words: bool = False


def _whole(low: int, high: float = math.inf, *, none: bool = False) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError
        if not low <= int(value) <= high:
            raise ValueError
        return int(value)

    return read


def _real(holds: Callable[[float], bool], *, none: bool = False) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        number = float(value)
        if not math.isfinite(number) or not holds(number):
            raise ValueError
        return number

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a character could not be written to a file
    if not value.strip() or set(value) & set("\0\n\r"):
        raise ValueError
    return str(value)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _place(value: Any) -> str:
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    return _text(found)


def _place_or_none(value: Any) -> str | None:
    return None if value is None else _place(value)


def _preset(value: Any) -> str:
    if value == "sft":
        raise ForgeError(
            "it trains all weights, and a tuner makes adapters. Take preset='lora' or 'qlora' for supervised "
            "fine-tuning with adapters, or get_preset('sft') with TRL's SFTTrainer."
        )
    if not isinstance(value, str):
        raise TypeError
    known = [name for name in PRESETS if name != "sft"]
    if value not in known:
        raise UnknownNameError.among("preset", value, known)
    return str(value)


def _validation(value: Any) -> Any:
    if value is None or isinstance(value, (str, os.PathLike)):
        return _place_or_none(value)
    if isinstance(value, Integral):
        return _whole(1)(value)
    return _real(lambda share: 0 < share < 1)(value)


def _judge(value: Any) -> Any:
    if value is None or value is False:
        return None
    if value is True or isinstance(value, Judge):
        return value
    name = _text(value)
    if name not in list_judges():
        raise ForgeError(
            f"no judge has that name; registered are {', '.join(list_judges())}. For a model of one of their services "
            f"register a judge of your own first ({_EXAMPLE_JUDGE}), or pass the judge itself."
        )
    return name


def _bert_score(value: Any) -> Any:
    if isinstance(value, (bool, str, os.PathLike)):
        return value if isinstance(value, bool) else _place(value)
    from ...evaluation.bert_score import BertScore

    if not isinstance(value, BertScore):
        raise TypeError
    return value


def _gpu(value: Any) -> str | None:
    if value is None:
        return None
    name = _text(value)
    find_card(name)
    return name


def _trackers(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError
    for name in names:
        if name == "mlflow":
            raise ForgeError("MLflow is switched on by mlflow_enabled=True. Leave it out here.")
        if name not in TRACKERS:
            raise UnknownNameError.among("tracker", name, TRACKERS)
    return tuple(dict.fromkeys(str(name) for name in names))


def _project(value: Any) -> Any:
    return _text_or_none(value) if value is None or isinstance(value, str) else _whole(-math.inf)(value)  # type: ignore[arg-type]


def _space(value: Any) -> Any:
    if value is None:
        return None
    from ..search.space import SearchSpace

    if isinstance(value, SearchSpace):
        return value
    if not isinstance(value, Mapping):
        raise TypeError
    try:
        return SearchSpace.from_dict(value)
    except ForgeError as error:
        lines = str(error).splitlines()
        raise ForgeError("; ".join(line.strip() for line in lines[1:] or lines)) from None


def _one_of(*names: str | None) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value is None and None in names:
            return None
        if not isinstance(value, str):
            raise TypeError
        if value not in names:
            raise UnknownNameError.among("choice", value, [name for name in names if name])
        return str(value)

    return read


def _pack(value: Any) -> Any:
    return value if value == "auto" and isinstance(value, str) else _whole(1)(value)


def _storage(value: Any) -> str | None:
    if value is None:
        return None
    url = _text(value)
    if "://" not in url:
        raise ValueError
    return url


def _overrides(value: Any) -> FrozenMapping:
    if not isinstance(value, Mapping):
        raise TypeError
    return FrozenMapping({})  # each of its names has a line of its own: see check.py


_COUNT = "a whole number of at least 1"
_COUNT_OR_NONE = f"{_COUNT}, or None"
_PLACE = "a path or a hub id as text, not empty"

RULES: dict[str, Rule] = {
    "model_name": Rule(_place_or_none, "a hub id or a folder as text, not empty", "Pass 'Qwen/Qwen3-0.6B', say."),
    "preset": Rule(_preset, "'qlora', 'lora' or 'dpo'", "Pass one of these."),
    "num_train_epochs": Rule(_real(lambda n: n > 0, none=True), "a number above 0, or None", "Pass 3, say."),
    "effective_batch_size": Rule(_whole(1, none=True), _COUNT_OR_NONE, "Pass 16, say."),
    "learning_rate": Rule(_real(lambda n: n > 0, none=True), "a number above 0, or None", "Pass 2e-4, say."),
    "max_length": Rule(
        _whole(2, none=True), "a whole number of at least 2 tokens, or None for the preset's", "Pass 2048, say."
    ),
    "overrides": Rule(_overrides, "a mapping of get_preset's names to values", "Pass {'lora_r': 32}, say."),
    "freeze_ratio": Rule(
        _real(lambda share: 0 <= share < 1), "a share of the layers, at least 0 and less than 1", "Pass 0.5, say."
    ),
    "prefix_cache": Rule(_flag, "True or False", "Pass one of these.", words=True),
    "ema": Rule(_flag, "True or False", "Pass one of these.", words=True),
    "train_data": Rule(_place_or_none, _PLACE, "Pass 'train.jsonl', say."),
    "validation_data": Rule(
        _validation,
        "a path or a hub id as text, a share of the rows (a float above 0 and below 1) or a number of rows",
        "Pass 'validation.jsonl', 0.05 or 64, say.",
    ),
    "n_trials": Rule(_whole(1), _COUNT, "Pass 20, say."),
    "space": Rule(_space, "a SearchSpace, a mapping of its fields, or None", "Pass {'lora_r': [8, 16]}, say."),
    "sampler": Rule(_one_of("tpe", "gp", "random"), "'tpe', 'gp' or 'random'", "Pass one of these."),
    "objective": Rule(
        _one_of("combined", "bert_score", "loss", None),
        "'combined', 'bert_score', 'loss' or None",
        "Pass one of these.",
    ),
    "score_every_trial": Rule(_flag, "True or False", "Pass one of these.", words=True),
    "finalists": Rule(_whole(1), _COUNT, "Pass 3, say."),
    "pack": Rule(_pack, f"'auto' or {_COUNT}", "Pass 'auto', say."),
    "engine": Rule(
        _one_of("auto", "packed", "shared", "reload"), "'auto', 'packed', 'shared' or 'reload'", "Pass one."
    ),
    "workers": Rule(_whole(1), _COUNT, "Pass 1, say."),
    "launcher": Rule(_one_of("local", "ray"), "'local' or 'ray'", "Pass one of these."),
    "study_name": Rule(_text_or_none, "a name as text, not empty, or None", "Pass 'chats', say."),
    "storage": Rule(_storage, "a database's URL as text, or None", "Pass 'postgresql://user@host/database', say."),
    "judge": Rule(_judge, "a judge, its name, True for the default one, or None", "Pass 'local', say.", words=True),
    "bert_score": Rule(
        _bert_score, "True, False, an encoder's hub id or folder, or a BertScore", "Pass True, say.", words=True
    ),
    "max_eval_samples": Rule(_whole(1, none=True), f"{_COUNT_OR_NONE} for all", "Pass 64, say."),
    "judge_samples": Rule(_whole(1, none=True), f"{_COUNT_OR_NONE} for all", "Pass 32, say."),
    "max_new_tokens": Rule(_whole(1), _COUNT, "Pass 128, say."),
    "eval_batch_size": Rule(_whole(1), _COUNT, "Pass 8, say."),
    "gpu": Rule(_gpu, "a GPU's name or the memory it has, as text", "Pass 'RTX 4090' or '24GB', say."),
    "seed": Rule(_whole(0, LARGEST_SEED), f"a whole number from 0 to {LARGEST_SEED}", "Pass 42, say."),
    "output_dir": Rule(_place, "a folder as text, not empty", "Pass 'outputs/tuning', say."),
    "report_to": Rule(_trackers, f"some of {', '.join(map(repr, TRACKERS))}", "Pass ('tensorboard',), say."),
    "mlflow_enabled": Rule(_flag, "True or False", "Pass one of these.", words=True),
    "mlflow_tracking_uri": Rule(
        _place_or_none, "an address or a folder as text, not empty", "Pass 'http://127.0.0.1:5000', say."
    ),
    "mlflow_experiment_name": Rule(_text, "a name as text, not empty", "Pass 'forge', say."),
    "project_id": Rule(_project, "a whole number or a name as text, not empty", "Pass 123, say."),
}


def read(name: str, value: Any) -> tuple[Any, str]:
    """A field's value as a config keeps it, and why it will not do, which is empty where it does."""
    rule = RULES[name]
    try:
        return rule.read(value), ""
    except ForgeError as error:
        return None, str(error)
    except (TypeError, ValueError, OverflowError):
        return None, f"it must be {rule.says}. {rule.remedy}"


def unknown_field(name: object) -> str:
    """Why a field does not exist, with the nearest one."""
    return str(UnknownNameError.among("field", str(name), RULES))


def line(label: str, value: Any, why: str) -> str:
    """A line about a value: what it is called, what it is, and why it will not do."""
    return f"{label}={shown(value)}: {why}"
