"""From what a caller said to what will run: what can be refused is refused here, before weights are loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import PreparedData, prepare_dataset
from ..data.source import load
from ..errors import ConflictError, ForgeError, UnsupportedError
from ..models.anatomy import load_config, quantization_of
from ..presets import Preset, get_preset
from .arguments import arguments
from .config import TuningConfig
from .fit import check_fit, surely_fits
from .record import record_of
from .tracking import check_tracking

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ..evaluation import BertScore
    from ..memory import MemoryEstimate
    from .run_folder import RunFolder

logger = logging.getLogger("forge.tuning")

# The share of the rows that is held out when nobody says what to validate on.
HELD_OUT = 0.1
_ALL_WEIGHTS = (
    "preset={!r} trains all weights, and LoRATuner trains adapters: take preset='qlora' or 'lora', or pass the "
    "preset's objects to a trainer of your own (examples/train_with_forge.py)."
)
_FROM_HUB = ("revision", "trust_remote_code")


@dataclass(frozen=True)
class Settled:
    """A run of which everything is known but its result.

    Args:
        config: what was asked for.
        preset: the recipe, for this model and machine.
        model: an id or a folder, or a live model.
        tokenizer: the model's.
        data: prepared.
        encoder: BERTScore's, loaded; None without.
        estimate: of its memory.
        record: what it is, as JSON knows it.
        model_config: the model's.
        longest: tokens in the longest row that the trainer will see.
    """

    config: TuningConfig
    preset: Preset
    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    encoder: BertScore | None
    estimate: MemoryEstimate
    record: Mapping[str, Any]
    model_config: PreTrainedConfig
    longest: int


def settle(
    model: Any,
    train: Any,
    validation: Any,
    *,
    preset: str | Preset,
    config: TuningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: RunFolder,
) -> Settled:
    """Build the recipe, prepare the data, load BERTScore's encoder, estimate the memory.

    Raises:
        ForgeError: what will not do; see `LoRATuner`.
    """
    _refuse_many_processes()
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    live = not isinstance(model, (str, os.PathLike))
    if live:
        _refuse_what_cannot_be_adapted(model)
    recipe = _recipe(model, preset, config, live=live)
    if config.mlflow_enabled:
        check_tracking(config.mlflow_tracking_uri)
    arguments(recipe, config, folder)  # refuses what the trainer would refuse much later
    model_config = _config_of(model, recipe, live=live)
    tokenizer = tokenizer or _tokenizer(model, model_config, recipe, live=live)
    data = _prepare(train, validation, tokenizer, recipe)
    encoder = _encoder(config)
    longest, packed = _lengths(data, recipe)
    estimate = check_fit(model_config, recipe, config, longest=longest, packed=packed)
    if not surely_fits(estimate, recipe, config):
        logger.warning(
            "It is uncertain whether the run fits: it needs %.1f to %.1f GiB.", estimate["low_gb"], estimate["high_gb"]
        )
    given = {"model": model, "train": train, "validation": validation}
    record = record_of(config, recipe, model_config, data, encoder=encoder, given=given)
    return Settled(config, recipe, model, tokenizer, data, encoder, estimate, record, model_config, longest)


def _recipe(model: Any, preset: str | Preset, config: TuningConfig, *, live: bool) -> Preset:
    overrides = config.preset_overrides()
    if (preset.name if isinstance(preset, Preset) else preset) == "sft":
        raise UnsupportedError(_ALL_WEIGHTS.format("sft"))
    if isinstance(preset, Preset):
        new = {name: value for name, value in overrides.items() if preset.overrides.get(name) != value}
        recipe = preset.replace(**new) if new else preset
    else:
        try:
            recipe = get_preset(preset, model=model, **overrides)
        except OSError as error:  # what transformers raises when a config cannot be had; it may not name the model
            raise ForgeError(f"The config of model {str(model)!r} could not be read: {error}") from error
    if (missing := recipe.hardware.missing_here()) is not None:
        raise ConflictError(
            f"The preset is for {recipe.hardware.name!r}, and {missing}. preset.on(Hardware.detect()) is the same "
            "recipe for this machine."
        )
    if not recipe.choices["use_peft"].value:
        raise UnsupportedError(_ALL_WEIGHTS.format(recipe.name))
    if recipe.objective == "dpo" and (bias := recipe.choices["bias"].value) != "none":
        raise ConflictError(
            f"bias={bias!r} with preset='dpo': DPOTrainer keeps its reference as a second adapter, and PEFT has biases "
            "in one only. Leave bias out."
        )
    if live and (wanted := str(recipe.choices["precision"].value)) in ("nf4", "fp4", "int8"):
        found = quantization_of(getattr(model, "config", None))
        if found is None:
            raise ConflictError(
                f"preset={recipe.name!r} trains on {wanted} weights, and those of the model that was given are not "
                "quantised. Give its id instead, load it with **get_preset(...).model_kwargs(), or take preset='lora'."
            )
    return recipe


def _refuse_what_cannot_be_adapted(model: Any) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in _modules(model)):
        raise ConflictError(
            "The model carries adapters already, and a run begins without: safe_unload_peft_adapters(model) gives the "
            "base, or hand in the model's id."
        )
    if not isinstance(model, PreTrainedModel):
        raise ConflictError(f"model_or_id={model!r:.60}: give an id, a folder, or a model that is loaded.")


def _modules(model: Any) -> Any:
    return model.modules() if hasattr(model, "modules") else ()


def _config_of(model: Any, recipe: Preset, *, live: bool) -> PreTrainedConfig:
    if live:
        return model.config
    return load_config(str(model), **_hub_options(recipe))


def _tokenizer(model: Any, config: PreTrainedConfig, recipe: Preset, *, live: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = getattr(config, "_name_or_path", "") if live else str(model)
    if not name:
        raise ForgeError("The model does not say where it comes from, so its tokenizer is unknown: pass tokenizer=.")
    try:
        return AutoTokenizer.from_pretrained(name, **_hub_options(recipe))
    except (OSError, ValueError) as error:
        raise ForgeError(f"No tokenizer was found at {name!r} ({error}): pass tokenizer=.") from error


def _hub_options(recipe: Preset) -> dict[str, Any]:
    return {name: recipe.choices[name].value for name in _FROM_HUB if name in recipe.choices}


def _prepare(train: Any, validation: Any, tokenizer: PreTrainedTokenizerBase, recipe: Preset) -> PreparedData:
    if isinstance(train, PreparedData):
        if validation is not None:
            raise ConflictError("train is prepared already, with its own validation part: leave validation out.")
        data = train
        limit, longest = recipe.choices["max_length"].value, _longest(data)
        if limit and longest > limit:
            raise ConflictError(
                f"The data are prepared with rows of up to {longest} tokens, and max_length={limit} would cut their "
                f"ends off. Prepare them with max_length={limit}, or set max_length={longest}."
            )
    else:
        # A length of None would leave rows longer than what the trainer keeps.
        length = recipe.choices["max_length"].value
        held_out = _held_out(train) if validation is None else validation
        data = prepare_dataset(train, tokenizer, max_length=length, validation=held_out)
    if data.validation is None or not len(data.validation):
        raise ConflictError(
            "There is nothing to validate on, and without it nobody knows whether the run made the model better. "
            "Prepare with validation=0.1, or pass a validation set."
        )
    if (data.report.format == "preference") != (recipe.objective == "dpo"):
        needed, fits = ("preferences", "qlora") if recipe.objective == "dpo" else ("conversations or texts", "dpo")
        raise ConflictError(
            f"preset={recipe.name!r} learns from {needed}, and these data are of the format {data.report.format!r}. "
            f"Take preset={fits!r}, or other data."
        )
    return data


def _longest(data: PreparedData) -> int:
    """Tokens in the longest row as it was prepared."""
    kept = data.report.max_length
    longest = max(split.lengths.max for split in data.report.splits)
    return longest if kept is None else min(longest, kept)


def _held_out(train: Any) -> float | None:
    """Nothing where the data bring a validation split, else a share of them."""
    return None if load(train).held_out is not None else HELD_OUT


def _encoder(config: TuningConfig) -> BertScore | None:
    from ..evaluation import BertScore
    from ..evaluation.scoring import as_encoder

    wanted = BertScore(config.bert_score) if isinstance(config.bert_score, str) else config.bert_score
    encoder = as_encoder(wanted)
    return None if encoder is None else encoder.load()


def _lengths(data: PreparedData, recipe: Preset) -> tuple[int, bool]:
    """Tokens in the longest row that the trainer will see, and whether it packs."""
    limit = int(recipe.choices["max_length"].value or 0)
    packed = bool(recipe.choices["packing"].value) if "packing" in recipe.choices else False
    longest = data.report.train.lengths.max
    return (limit if packed and limit else max(2, min(longest, limit) if limit else longest)), packed


def _refuse_many_processes() -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        raise UnsupportedError(
            f"WORLD_SIZE={processes}: LoRATuner runs in one process. Under torchrun or accelerate, pass the preset's "
            "objects to a trainer of your own (examples/train_with_forge.py)."
        )
