"""What a tuning run is made of: one frozen value, from arguments, a file, the environment or a request."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...reporting.private import without_credentials
from .check import check, raise_if_any
from .files import read_fields, write_fields
from .found import Found
from .rules import MERGED, unknown_field
from .settings import of_environment, of_request
from .values import FrozenMapping, plain, shown

if TYPE_CHECKING:
    from ...evaluation import BertScore, Judge
    from ..search.space import SearchSpace


@dataclass(frozen=True, kw_only=True, repr=False)
class TuningConfig:
    """The settings of a tuning run. None leaves a value to the preset, or to the library that has a default.

    >>> config = TuningConfig(model_name="Qwen/Qwen3-0.6B", learning_rate=1e-4, n_trials=5)
    >>> config
    TuningConfig(model_name='Qwen/Qwen3-0.6B', learning_rate=0.0001, n_trials=5)
    >>> config.preset_overrides()
    {'learning_rate': 0.0001}
    >>> TuningConfig(n_trials=0, gpu="")
    Traceback (most recent call last):
    forge.errors.ConflictError: TuningConfig: 2 values will not do.
      n_trials=0: it must be a whole number of at least 1. Pass 20, say.
      gpu='': it must be a GPU's name or the memory it has, as text. Pass 'RTX 4090' or '24GB', say.

    Args:
        model_name: A hub id or a folder.
        preset: "qlora", "lora" or "dpo". ("sft" trains all weights, and a tuner makes adapters.)
        num_train_epochs: Passes over the training rows.
        effective_batch_size: Sequences per optimizer step, over all processes.
        learning_rate: The peak of the schedule.
        max_length: The longest row, in tokens. For no limit at all, `overrides={"max_length": None}`.
        overrides: Whatever else `get_preset` takes, by its names: `{"lora_r": 32, "target_modules": ["q_proj"]}`. Kept
            as a copy that cannot be changed, under the names that a preset uses; lists are tuples in it.
        freeze_ratio: The share of the lowest layers to freeze, in [0, 1).
        prefix_cache: Whether what the frozen layers compute is kept for later epochs.
        ema: Whether an average of the adapter's weights is kept and saved.
        train_data: A path or a hub id.
        validation_data: A path or a hub id; or how much of the training rows to hold out, as a share (a float) or a
            number of rows (an int).
        n_trials: How many settings a search tries in all. This and the next eleven are of `BayesianLoRATuner`; one run
            of `LoRATuner` has no use for them.
        space: What is searched: a `SearchSpace`, or a mapping of its fields; None for the default one.
        sampler: "tpe", "gp" (a Gaussian process) or "random".
        objective: The figure that decides: "combined" (BERTScore and judge), "bert_score" or "loss" (held-out); None
            for the first of them that can be measured.
        score_every_trial: Whether every completed trial is scored by it, and not the finalists alone.
        finalists: How many trials, those of the lowest held-out loss, are scored in the end.
        pack: How many trials train in one pass; "auto" measures what pays.
        engine: "packed", "shared" (one adapter at a time on one base), "reload" (the base loaded anew each time), or
            "auto" for the first that works and pays.
        workers: How many processes search, one engine each.
        launcher: Who starts them: "local" or "ray".
        study_name: Of Optuna's study; None for the name of `output_dir`.
        storage: The URL of its database; None for SQLite in `output_dir`. Credentials are never shown.
        judge: A judge, the name of one, True for the default one (`FORGE_JUDGE`, else "local"), None or False for none.
        bert_score: A `BertScore`, an encoder's id or folder, True for bert-score's own choice, False for none.
        max_eval_samples: At most so many held-out samples are evaluated: answers and loss; None for all.
        judge_samples: At most so many of them are shown to the judge; None for all.
        max_new_tokens: The longest answer, in tokens.
        eval_batch_size: Samples at a time when answers are generated.
        gpu: The card that the run must fit on ("RTX 4090", "24GB"); None for the one that is here.
        seed: Of the adapter's weights and of the order of the rows.
        output_dir: The run's folder.
        report_to: "wandb", "tensorboard", "trackio", for the trainer. MLflow has a switch of its own.
        mlflow_enabled: Whether MLflow records the run.
        mlflow_tracking_uri: The address of its server, or a folder. Credentials in it are used, and never shown or
            written anywhere; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are a better place for them.
        mlflow_experiment_name: The experiment's name there.
        project_id: Of the request that asked for the run; a label, never a path.

    Raises:
        ConflictError: Values that will not do; the message has a line for each, with the rule and the remedy.
    """

    model_name: str | None = None
    preset: str = "qlora"
    num_train_epochs: float | None = None
    effective_batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=FrozenMapping)
    freeze_ratio: float = 0.0
    prefix_cache: bool = False
    ema: bool = False
    train_data: str | None = None
    validation_data: str | float | int | None = None
    n_trials: int = 20
    space: SearchSpace | Mapping[str, Any] | None = None
    sampler: str = "tpe"
    objective: str | None = None
    score_every_trial: bool = False
    finalists: int = 3
    pack: str | int = "auto"
    engine: str = "auto"
    workers: int = 1
    launcher: str = "local"
    study_name: str | None = None
    storage: str | None = None
    # Not part of the hash: a judge of one's own may compare by value and have none.
    judge: str | bool | Judge | None = field(default=None, hash=False)
    bert_score: bool | str | BertScore = field(default=True, hash=False)
    max_eval_samples: int | None = 64
    judge_samples: int | None = 32
    max_new_tokens: int = 128
    eval_batch_size: int = 8
    gpu: str | None = None
    seed: int = 42
    output_dir: str = "outputs/tuning"
    report_to: tuple[str, ...] = ()
    mlflow_enabled: bool = False
    mlflow_tracking_uri: str | None = None
    mlflow_experiment_name: str = "forge"
    project_id: int | str | None = None

    def __post_init__(self) -> None:
        kept, problems = check({name: getattr(self, name) for name in FIELDS})
        raise_if_any(problems)
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def preset_overrides(self) -> dict[str, Any]:
        """What to hand to `get_preset(config.preset, **config.preset_overrides())`: a dict of the caller's own.

        >>> TuningConfig(max_length=512, overrides={"r": 8}).preset_overrides()
        {'max_length': 512, 'lora_r': 8}
        """
        merged = {name: getattr(self, name) for name in MERGED if getattr(self, name) is not None}
        return merged | dict(plain(self.overrides))

    def replace(self, **changes: Any) -> TuningConfig:
        """This config with other values, checked anew.

        >>> TuningConfig(n_trials=5).replace(seed=1)
        TuningConfig(n_trials=5, seed=1)

        Raises:
            ConflictError: An unknown field, or values that will not do.
        """
        return _build(changes, base={name: getattr(self, name) for name in FIELDS})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **arguments: Any) -> TuningConfig:
        """The config that a YAML or JSON file holds.

        YAML is read as version 1.2 has it: `1e-4` is a number, and `on`, `off`, `yes` and `no` mean True and False only
        in fields that take these. Inside `overrides` they must be written as true or false, or quoted.

        Args:
            path: Of a .yaml, .yml or .json file: a mapping of the fields. Paths in it are relative to the working
                folder, as everywhere.
            arguments: Fields, each of which goes before the file's (`overrides` as a whole).

        Raises:
            ForgeError: There is no such file, or it cannot be read; the message names the line.
            ConflictError: Unknown fields, or values that will not do; the message has a line for each.
        """
        return _build(arguments, read_fields(Path(path), skip=arguments.keys()))

    def to_file(self, path: str | os.PathLike[str]) -> Path:
        """Write all fields as YAML or JSON, whole or not at all; `from_file` reads an equal config back.

        Credentials in `mlflow_tracking_uri` are left out. A judge and a `BertScore` are written by their names, so the
        name of a judge of your own must be registered when the file is read.

        Args:
            path: Ends in .yaml, .yml or .json; its folder is made.

        Raises:
            ForgeError: It ends otherwise.
        """
        return write_fields(Path(path), self.to_dict())

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> TuningConfig:
        """The config that the environment asks for.

        >>> TuningConfig.from_env({"LORA_N_TRIALS": "7", "MLFLOW_ENABLED": "on"}, n_trials=8)
        TuningConfig(n_trials=8, mlflow_enabled=True)

        | variable | field |
        |---|---|
        | `LORA_MODEL_NAME` | `model_name` |
        | `LORA_N_TRIALS` | `n_trials` |
        | `LORA_NUM_EPOCHS` | `num_train_epochs` |
        | `LORA_BATCH_SIZE` | `effective_batch_size` |
        | `LORA_LEARNING_RATE` | `learning_rate` |
        | `MLFLOW_ENABLED` (true, false, yes, no, on, off, 1, 0) | `mlflow_enabled` |
        | `MLFLOW_TRACKING_URI` | `mlflow_tracking_uri` |
        | `MLFLOW_EXPERIMENT_NAME` | `mlflow_experiment_name` |

        Args:
            environ: By default `os.environ`. Variables that are blank count as not set.
            arguments: Fields, each of which goes before the environment's; its variable is then not read.

        Raises:
            ConflictError: Values that will not do; the message has a line for each, with the variable's name.
        """
        return _build(arguments, of_environment(os.environ if environ is None else environ, skip=arguments.keys()))

    @classmethod
    def from_request(
        cls,
        request: Mapping[str, Any] | str | bytes,
        *,
        projects: Mapping[Any, str | os.PathLike[str]] | Callable[[int | str], Any] | None = None,
        environ: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> TuningConfig:
        """The config that a request asks for, as a service gets it.

        >>> TuningConfig.from_request(
        ...     {
        ...         "project_id": 123,
        ...         "fine_tuning_params": {
        ...             "use_llm_judge": True,
        ...             "judge_model_id": "gemini",
        ...             "base_model_name": "Qwen/Qwen3-0.6B",
        ...             "n_trials": 20,
        ...         },
        ...     },
        ...     environ={},
        ... )
        TuningConfig(model_name='Qwen/Qwen3-0.6B', judge='gemini', project_id=123)

        An argument goes before the request, the request before the environment (see `from_env`), and that before the
        default. The request is checked in full, whatever goes before it.

        | in the request | field |
        |---|---|
        | `project_id` (a number or a text) | `project_id`, and through `projects` the data |
        | `fine_tuning_params.base_model_name` | `model_name` |
        | `fine_tuning_params.n_trials` (5 to 100) | `n_trials` |
        | `fine_tuning_params.judge_model_id` (a registered judge) | `judge` |
        | `fine_tuning_params.use_llm_judge` | true: that judge, or the default one; false: none, named or not |

        Args:
            request: A mapping, or JSON text of one. null counts as not given.
            projects: The folder of each project's data by its id (123 and "123" are the same project), or a function
                from id to folder. In it are `train` and perhaps `validation` (or `val`, `valid`, `dev`, `test`) as
                .jsonl, .json, .csv, .parquet, ..., or one data file, or what `save_to_disk` wrote. The id itself never
                becomes part of a path. Without `projects` the id is kept as a label, and the data come from elsewhere.
            environ: By default `os.environ`.
            arguments: Fields. With `train_data` among them the project's folder is not looked at.

        Raises:
            ConflictError: Unknown keys, values that will not do, a project without data; the message has a line for
                each, with its path in the request.
        """
        found = of_request(request, projects, look_up="train_data" not in arguments)
        rest = of_environment(os.environ if environ is None else environ, skip={*arguments, *found.given})
        return _build(arguments, found.before(rest))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON knows them: objects by their names, and no credentials."""
        found = {name: plain(getattr(self, name)) for name in FIELDS}
        for name in ("judge", "bert_score"):
            found[name] = _named(found[name])
        if self.space is not None:
            found["space"] = self.space.to_dict()  # type: ignore[union-attr]  # a mapping became a space
        for name in ("mlflow_tracking_uri", "storage"):
            if found[name] is not None:
                found[name] = without_credentials(found[name])
        return found

    def __repr__(self) -> str:
        """What differs from the defaults, without credentials."""
        values = ((name, getattr(self, name)) for name in FIELDS)
        differs = [f"{name}={shown(_named(value))}" for name, value in values if value != _DEFAULTS[name]]
        return f"TuningConfig({', '.join(differs)})"


def _named(value: Any) -> Any:
    """A judge or an encoder by its name; anything else as it is."""
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, Mapping)):
        return value
    return getattr(value, "name", "") or getattr(value, "model_type", "") or type(value).__name__


def _build(
    values: Mapping[str, Any], found: Found | None = None, *, base: Mapping[str, Any] | None = None
) -> TuningConfig:
    """A config of these values; all that is wrong with them is said at once.

    Args:
        values: By field, as a caller gave them; some fields may be unknown.
        found: What was found elsewhere, for the fields that `values` leave open.
        base: What holds for fields that neither names; the defaults if None.
    """
    found = found or Found("TuningConfig")
    known = {name: value for name, value in values.items() if name in FIELDS}
    unknown = [f"{name}: {unknown_field(name)}" for name in values if name not in FIELDS]
    merged = {**found.values, **known}
    labels = {name: label for name, label in found.labels.items() if name not in known}
    _, wrong = check({**(base or _DEFAULTS), **merged}, labels)
    raise_if_any([*found.problems, *unknown, *wrong], found.source)
    return TuningConfig(**{**(base or {}), **merged})


FIELDS = tuple(one.name for one in fields(TuningConfig))
_DEFAULTS: dict[str, Any] = {
    one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(TuningConfig)
}
