"""The average on disk: a folder that `from_pretrained` loads as it is, and beside it what resuming needs.

    checkpoint-500/
      ema/
        adapter_config.json, adapter_model.safetensors   or config.json, model.safetensors: the averaged model
        average.safetensors                              the fp32 shadow, with its counts and a token as metadata

The token is also in the checkpoint's trainer_state.json: so a resumed run knows whether the average that it found is
the one that belongs to the weights that it resumes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ForgeError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerState, TrainingArguments

FOLDER = "ema"
FILE = "average.safetensors"
WEIGHTS = "weights"
"""What `resume_from` says for beginning a new average at the weights that are resumed."""


@dataclass(frozen=True)
class SavedAverage:
    """What `average.safetensors` holds.

    Args:
        average: Name to fp32 tensor.
        updates: How often the average was updated.
        steps: Optimizer steps that were taken, skipped ones not counted.
        token: Which save this is, the same as in trainer_state.json.
        folder: The checkpoint that it was read from.
    """

    average: Mapping[str, Tensor]
    updates: int
    steps: int
    token: str = ""
    folder: Path | None = None

    def write(self, folder: Path) -> None:
        """Write to `folder/average.safetensors`."""
        from safetensors.torch import save_file

        metadata = {"updates": str(self.updates), "steps": str(self.steps), "token": self.token}
        save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, folder / FILE, metadata)

    @classmethod
    def read(cls, folder: Path) -> SavedAverage:
        """Read from a checkpoint or from its `ema` folder.

        Raises:
            ForgeError: There is no average in it, or it is not readable.
        """
        from safetensors import SafetensorError, safe_open

        path = find(folder)
        if path is None:
            raise ForgeError(
                f"{folder} holds no average: neither {FILE} nor {FOLDER}/{FILE} is there. Name a checkpoint that was "
                "saved with EMACallback in its list."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                average = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return cls(average, int(metadata["updates"]), int(metadata["steps"]), metadata["token"], path.parent.parent)
        except (SafetensorError, KeyError) as error:
            raise ForgeError(f"{path} is not an average that EMACallback wrote ({error!r}).") from error


def find(folder: Path) -> Path | None:
    """The file of the average in a checkpoint or in its `ema` folder."""
    return next((path for path in (folder / FOLDER / FILE, folder / FILE) if path.is_file()), None)


def token_of(folder: Path) -> str | None:
    """The token of the average in a checkpoint, None where there is none; reads the header only."""
    from safetensors import SafetensorError, safe_open

    path = find(folder)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            token: str | None = (file.metadata() or {}).get("token")
    except SafetensorError:
        return None
    return token


def locate(callback: str, args: TrainingArguments, state: TrainerState, *, given: Path | None) -> Path | None:
    """The checkpoint that is resumed, whose path no event is told; None when it has no average or is not found.

    Args:
        callback: The class name, under which the Trainer keeps the callback's state.
        args: The trainer's arguments.
        state: The trainer's state, as loaded from the checkpoint.
        given: Where the user says that it may be.
    """
    saved = _saved(callback, state)
    named = args.resume_from_checkpoint
    candidates = [
        given,
        saved.get("folder"),
        Path(args.output_dir) / f"checkpoint-{state.global_step}",
        named if isinstance(named, str) else None,
    ]
    token = saved.get("token")
    places = [Path(place) for place in candidates if place]
    return next((place for place in places if token and token_of(place) == token), None)


def not_found(callback: str, state: TrainerState) -> ForgeError:
    """What to say when a resumed checkpoint's average is not there."""
    step = f"checkpoint-{state.global_step}"
    why = "was moved" if _saved(callback, state).get("token") else "was saved without EMACallback(save=True)"
    return ForgeError(
        f"The average of step {state.global_step} was not found: its checkpoint {why}. Give the place, "
        f'EMACallback(resume_from=".../{step}"), or start a new average at the resumed weights, '
        f'EMACallback(resume_from="{WEIGHTS}").'
    )


def _saved(callback: str, state: TrainerState) -> dict[str, str]:
    entry: Any = state.stateful_callbacks.get(callback) or {}
    found: dict[str, str] = entry.get("attributes", {}).get("saved", {})
    return found


def run_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts its checkpoints: below the output folder for each trial of a hyperparameter search."""
    output = Path(args.output_dir)
    if not state.is_hyper_param_search:
        return output
    if state.trial_name is not None:
        return output / str(state.trial_name)
    saved = [folder.parent for folder in output.glob(f"*/checkpoint-{state.global_step}")]
    return max(saved, key=lambda run: run.stat().st_mtime, default=output)


def mend_adapters(model: Any, folder: Path | None) -> None:
    """Undo what the `ema` folder does to a resuming Trainer, which loads every folder with an adapter as one more.

    The adapter "ema" is removed. And the checkpoint's own adapter is loaded: transformers 5.0 leaves it out where there
    are folders beside it.

    Args:
        model: The model as the Trainer resumed it.
        folder: The checkpoint, where it is known.
    """
    if FOLDER not in getattr(model, "peft_config", {}) or FOLDER in model.active_adapters:
        return
    model.delete_adapter(FOLDER)
    if folder is not None and (folder / "adapter_config.json").is_file():
        model.load_adapter(folder, model.active_adapters[0], is_trainable=True)


def save_model(model: Any, folder: Path, *, processing_class: Any = None) -> None:
    """Save what the model holds now so that `from_pretrained` loads the folder as it is."""
    peft_config = getattr(model, "peft_config", None)
    if hasattr(model, "get_base_model") and peft_config:
        adapter = model.active_adapters[0]
        model.save_pretrained(folder, selected_adapters=[adapter])
        if adapter != "default":  # PEFT puts every other adapter in a folder of its own
            for path in (folder / adapter).iterdir():
                shutil.move(path, folder / path.name)
            (folder / adapter).rmdir()
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        _save_module(model, folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def _save_module(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_model as save_with_ties

    folder.mkdir(parents=True, exist_ok=True)
    save_with_ties(model, str(folder / "model.safetensors"))
