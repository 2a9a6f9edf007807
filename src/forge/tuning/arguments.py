"""The trainer's arguments: the recipe's own, with this run's folder, seed and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError

if TYPE_CHECKING:
    from ..presets import Preset
    from .config import TuningConfig
    from .run_folder import RunFolder

# A tenth of a run is what a crash may cost; two, since the newest may be half written.
SAVE_STEPS, SAVED_CHECKPOINTS = 0.1, 2
# What the tuner decides itself, or would be done to half a result.
_REFUSED = {
    "save_only_model": "it keeps no optimizer, and a killed run could not go on",
    "push_to_hub": "it would publish checkpoints without the card; push result.adapter_path when the run is over",
    "resume_from_checkpoint": "the tuner finds the checkpoint itself",
}


def arguments(preset: Preset, config: TuningConfig, folder: RunFolder) -> Any:
    """An SFTConfig or a DPOConfig.

    Args:
        preset: the recipe.
        config: of it seed and trackers.
        folder: the run's.

    Raises:
        ConflictError: arguments that the run could not keep its promises with, or that transformers refuses.
    """
    from transformers.trainer_utils import SaveStrategy

    said = preset.overrides
    if said.get("load_best_model_at_end") and said.get("eval_steps") and "save_steps" not in said:
        # Only what was saved when it was evaluated can be the best, and transformers refuses other intervals.
        preset = preset.replace(save_steps=said["eval_steps"])
    try:
        args = preset.get_dpo_config() if preset.objective == "dpo" else preset.get_sft_config()
    except ForgeError:
        raise
    except (ValueError, TypeError) as error:
        raise ConflictError(f"The trainer refuses these arguments: {error}") from error
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            raise ConflictError(f"{name}={getattr(args, name)!r}: {why}. Leave it out.")
    args.output_dir = str(folder.checkpoints)
    args.seed = config.seed
    args.report_to = list(config.report_to)
    if not {"save_strategy", "save_steps"} & preset.overrides.keys():
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, SAVE_STEPS
    if args.save_strategy == SaveStrategy.NO:
        raise ConflictError("save_strategy='no': a killed run would begin anew. Leave it out, or set save_steps.")
    if "save_total_limit" not in preset.overrides:
        args.save_total_limit = SAVED_CHECKPOINTS
    return args
