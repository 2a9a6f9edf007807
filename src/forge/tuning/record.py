"""What a run is, as JSON knows it: enough to do it again, and to tell whether another one is the same."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..presets import Preset, get_preset
from .fingerprint import fingerprint_of, weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..data import PreparedData
    from ..evaluation import BertScore
    from .config import TuningConfig

# Of the config, what a run does not depend on.
_ELSEWHERE = {
    *("model_name", "preset", "train_data", "validation_data"),  # said better elsewhere in the record
    *("output_dir", "report_to", "gpu", "n_trials", "project_id"),
    *("space", "sampler", "objective", "score_every_trial", "finalists", "pack", "engine", "workers", "launcher"),
    *("study_name", "storage"),
    *("mlflow_enabled", "mlflow_tracking_uri", "mlflow_experiment_name"),
}
_PLAIN = (str, bool, type(None))
_PACKAGES = ("transformers-forge", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")


def record_of(
    config: TuningConfig,
    recipe: Preset,
    model_config: PreTrainedConfig,
    data: PreparedData,
    *,
    encoder: BertScore | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a run.

    Args:
        config: what was asked for.
        recipe: the preset.
        model_config: the model's.
        data: prepared.
        encoder: BERTScore's.
        given: "model", "train" and "validation" as the caller handed them in.
    """
    said = config.to_dict()
    model = _source(given["model"])
    return {
        "config": {key: value for key, value in said.items() if key not in _ELSEWHERE},
        "preset": recipe.name,
        "params": params_of(recipe),
        "model": {
            **model,
            "name": model["source"] or getattr(model_config, "_name_or_path", ""),
            "type": model_config.model_type,
            "config": _digest_of(model_config),
            "weights": weights_of(given["model"], model_config),
        },
        "data": {
            side: {**_source(given[side]), "rows": len(rows), "fingerprint": fingerprint_of(rows)}
            for side, rows in (("train", data.train), ("validation", data.validation))
            if rows is not None
        },
        "encoder": None if encoder is None else repr(encoder),
        "seed": config.seed,
        # What JSON cannot hold: `from_run` asks for it again.
        "objects": [name for name in ("judge", "bert_score") if not isinstance(getattr(config, name), _PLAIN)],
        "versions": versions(),
        "hardware": recipe.hardware.name,
        "elsewhere": {key: value for key, value in said.items() if key in _ELSEWHERE},
    }


def params_of(preset: Preset) -> dict[str, Any]:
    """The overrides with which `get_preset(preset.name, **params)` gives the same recipe without being shown the model.

    >>> preset = get_preset("lora", hardware="cpu", lora_r=8)
    >>> again = get_preset("lora", hardware="cpu", **params_of(preset))
    >>> {name: choice.value for name, choice in again.choices.items()} == {
    ...     name: choice.value for name, choice in preset.choices.items()
    ... }
    True
    """
    plain = get_preset(preset.name, hardware=preset.hardware, **preset.overrides)
    from_model = {
        name: choice.value
        for name, choice in preset.choices.items()
        if name not in plain.choices or plain.choices[name].value != choice.value
    }
    return {name: _plain(value) for name, value in {**preset.overrides, **from_model}.items()}


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    installed = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **{name: found for name, found in installed.items() if found}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _source(given: Any) -> dict[str, Any]:
    """Where something comes from, if it can be got there again; files by their full path."""
    if given is None:
        return {"source": None, "given": "None"}
    if isinstance(given, (str, os.PathLike)):
        return {"source": str(Path(given).resolve()) if Path(given).exists() else str(given), "given": "str"}
    return {"source": given if isinstance(given, (int, float)) else None, "given": type(given).__name__}


def _digest_of(config: PreTrainedConfig) -> str:
    import xxhash

    idle = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "quantization_config"}
    known = {name: value for name, value in config.to_dict().items() if name not in idle}
    return str(xxhash.xxh3_64(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest())


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):  # whose order is another one in every process
        return sorted((_plain(one) for one in value), key=str)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
