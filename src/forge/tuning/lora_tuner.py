"""LoRATuner: one run from data to a judged adapter."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..errors import ConflictError, ForgeError
from ..presets import Preset
from .config import TuningConfig
from .result import TuningResult
from .run_folder import RunFolder
from .settle import settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("forge.tuning")

# Fields of the config that change the recipe.
_RECIPE = {"preset", "overrides", "learning_rate", "num_train_epochs", "effective_batch_size", "max_length"}


class LoRATuner:
    """Train one adapter, and say whether the model is better for it.

        result = LoRATuner("Qwen/Qwen3-0.6B", "chats.jsonl", validation=0.1).run()
        result.print()
        get_preset("qlora", **result.params)  # the same recipe

    `run()` prepares the data, estimates the memory and refuses what will not fit before any weight is loaded, evaluates
    the base, trains with the standard SFTTrainer (DPOTrainer with preset "dpo"), evaluates again on the same held-out
    samples, and leaves an adapter, a model card and a report in `config.output_dir`.

    Killed or interrupted, the same call goes on, at the last checkpoint or evaluation, and to the same result. Ctrl-C
    and SIGTERM finish the step and write a checkpoint first.

    A model that is handed in live comes back as it was, bit for bit, whatever happened (`safe_unload_peft_adapters`).

    Args:
        model_or_id: a hub id, a folder, or a live model; None takes `config.model_name`.
        train: whatever `prepare_dataset` takes, or what it made; None takes `config.train_data`.
        validation: held-out data, a share (0.1) or a number of rows to hold out; None takes `config.validation_data`,
            else the validation split that comes with the data, else a tenth of them.
        preset: "qlora" (the default), "lora", "dpo", or a preset that you built; None takes `config.preset`.
        config: everything else; see `TuningConfig`.
        callbacks: for the trainer, after forge's own. A `MonitorCallback` of yours replaces forge's.
        tokenizer: the model's, where it is not to be found beside it.

    Raises:
        ForgeError: what is missing or contradicts itself, as far as it can be told without reading anything.
    """

    def __init__(
        self,
        model_or_id: PreTrainedModel | str | os.PathLike[str] | None = None,
        train: Any = None,
        validation: Any = None,
        *,
        preset: str | Preset | None = None,
        config: TuningConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        config = TuningConfig() if config is None else config
        if not isinstance(config, TuningConfig):
            raise ConflictError(
                f"config={config!r:.60}: give a TuningConfig, such as TuningConfig(learning_rate=1e-4)."
            )
        self.model_or_id = config.model_name if model_or_id is None else model_or_id
        self.train = config.train_data if train is None else train
        self.validation = config.validation_data if validation is None else validation
        self.preset = config.preset if preset is None else preset
        listed = isinstance(callbacks, (list, tuple))
        self.config, self.callbacks = config, tuple(callbacks) if listed else (callbacks,)
        self.tokenizer = tokenizer
        self._refuse_what_is_missing()

    def __repr__(self) -> str:
        called = self.model_or_id if isinstance(self.model_or_id, str) else type(self.model_or_id).__name__
        name = self.preset.name if isinstance(self.preset, Preset) else self.preset
        return f"LoRATuner({called!r}, preset={name!r}, output_dir={self.config.output_dir!r})"

    def run(self, *, resume: bool = True) -> TuningResult:
        """Do it, or what is left of it.

        Args:
            resume: whether a run in `config.output_dir` goes on, or is returned when it is over. If not, it is moved
                aside, never deleted.

        Returns:
            Parameters, metrics, and the paths of adapter, model card and report.

        Raises:
            ForgeError: what will not do: the data, the recipe, the memory, another run in the folder.
            TuningInterrupted: a KeyboardInterrupt, whose message says how to go on.
        """
        folder = RunFolder(self.config.output_dir)
        settled = settle(
            self.model_or_id,
            self.train,
            self.validation,
            preset=self.preset,
            config=self.config,
            tokenizer=self.tokenizer,
            folder=folder,
        )
        folder.begin(settled.record, resume=resume)
        if folder.finished:
            logger.info("The run in %s is over; this is its result.", folder.path)
            return TuningResult.load(folder.path)
        from .stages import Stages

        return Stages(settled, folder, self.callbacks).run()

    @classmethod
    def from_run(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        model: Any = None,
        train: Any = None,
        validation: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        **changes: Any,
    ) -> LoRATuner:
        """The tuner of a run that is recorded in a folder: to go on with it, or to reproduce it in another.

            LoRATuner.from_run("outputs/tuning", output_dir="outputs/again").run()

        Args:
            run_dir: the folder of a run.
            model: the live model, where the recorded run had one.
            train: the data, where they were no file or hub id.
            validation: as `train`.
            callbacks: those of the recorded run: a folder cannot hold them.
            tokenizer: the recorded run's, where it was handed in.
            **changes: fields of `TuningConfig` that differ, such as `output_dir`; without another `output_dir` the
                recorded run goes on.

        Raises:
            ForgeError: the folder holds no run, or something that it does not hold is missing here.
        """
        folder = RunFolder(os.fspath(run_dir))
        record = folder.read()
        given = {"model": model, "train": train, "validation": validation}
        sources = {"model": record["model"], **record["data"]}
        for name, source in sources.items():
            if given[name] is None and source["source"] is None and source["given"] != "None":
                raise ForgeError(
                    f"{folder.path} does not hold its {name}, which was handed in as {source['given']}: pass {name}=."
                )
            given[name] = source["source"] if given[name] is None else given[name]
        if missing := [name for name in record["objects"] if name not in changes]:
            raise ForgeError(
                f"{folder.path} does not hold its {' and '.join(missing)}, handed in as an object: pass "
                f"{'=, '.join(missing)}=."
            )
        fields = {**record["elsewhere"], **record["config"]}
        config = TuningConfig(**{name: value for name, value in fields.items() if name not in record["objects"]})
        return cls(
            given["model"],
            given["train"],
            given["validation"],
            # The recipe value for value, unless it is to be another one.
            preset=record["preset"] if _RECIPE & changes.keys() else folder.preset() or record["preset"],
            config=config.replace(**{"output_dir": str(folder.path), **changes}),
            callbacks=callbacks,
            tokenizer=tokenizer,
        )

    def _refuse_what_is_missing(self) -> None:
        missing = []
        if self.model_or_id is None:
            missing.append("a model: its id, its folder or the model itself (or config.model_name)")
        if self.train is None:
            missing.append("data to train on: a file, a hub id, rows (or config.train_data)")
        if not all(isinstance(one, TrainerCallback) for one in self.callbacks):
            raise ConflictError(
                f"callbacks={self.callbacks!r:.80}: give a list of TrainerCallbacks, such as [MonitorCallback()]."
            )
        if missing:
            raise ConflictError(f"LoRATuner needs {' and '.join(missing)}.")
