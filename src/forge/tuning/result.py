"""What a tuning run leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ForgeError
from ..evaluation import Comparison, EvaluationResult, compare_results
from ..reporting import Table
from .run_folder import RunFolder, write_json

_SHOWN = {
    "base_loss": "held-out loss of the base",
    "loss": "held-out loss",
    "base_bert_score": "BERTScore F1 of the base",
    "bert_score": "BERTScore F1",
    "base_llm_judge_score": "LLM judge on the base",
    "llm_judge_score": "LLM judge",
    "base_combined_score": "combined score of the base",
    "combined_score": "combined score",
    "steps": "optimizer steps",
    "train_runtime_s": "training, seconds",
    "peak_memory_gb": "peak memory of the GPU, GiB",
}


@dataclass(frozen=True)
class TuningResult:
    """What `LoRATuner.run` returns.

        result = LoRATuner("Qwen/Qwen3-0.6B", "chats.jsonl").run()
        result.print()
        PeftModel.from_pretrained(base, result.adapter_path)

    | metric | what |
    |---|---|
    | `loss`, `base_loss` | held-out loss, in nats per learnt token, with the adapter and without |
    | `bert_score`, `llm_judge_score`, `combined_score`, the same with `base_` | see `EvaluationResult`; if measured |
    | `train_loss`, `steps`, `train_runtime_s` | of the training; the loss is the mean of the logged ones |
    | `estimated_memory_gb`, `peak_memory_gb` | GiB; the peak of the GPU, only if there is one |

    Args:
        preset: the name of the recipe.
        params: its values: `get_preset(result.preset, **result.params)` gives the same recipe.
        metrics: figures by name, as above.
        run_dir: the run's folder.
        notes: what a reader should know before believing the numbers.
    """

    preset: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    run_dir: Path
    notes: tuple[str, ...] = ()

    @property
    def adapter_path(self) -> Path:
        """The folder of the adapter, for `PeftModel.from_pretrained(base, path)`."""
        return RunFolder(self.run_dir).adapter

    @property
    def report_path(self) -> Path:
        """The page that says what was done, measured and may be concluded."""
        return RunFolder(self.run_dir).report

    @property
    def model_card_path(self) -> Path:
        """The adapter's card, in the format of the hub."""
        return self.adapter_path / "README.md"

    @property
    def base(self) -> EvaluationResult:
        """The evaluation of the model without the adapter."""
        return EvaluationResult.load(RunFolder(self.run_dir).evaluation / "base")

    @property
    def tuned(self) -> EvaluationResult:
        """The evaluation of the model with the adapter."""
        return EvaluationResult.load(RunFolder(self.run_dir).evaluation / "tuned")

    def compare(self) -> Comparison:
        """Base against tuned, and what may be concluded: `.print()`."""
        return compare_results(self.base, self.tuned)

    def print(self) -> None:
        """Print the figures, what may be concluded, and where things are."""
        self._table().print()

    def __str__(self) -> str:
        return str(self._table())

    def save(self) -> None:
        """Write it into its folder."""
        said = {"preset": self.preset, "params": dict(self.params), "metrics": dict(self.metrics)}
        write_json(RunFolder(self.run_dir).result, {**said, "notes": list(self.notes)})

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> TuningResult:
        """The result of a run that is over.

        Raises:
            ForgeError: the folder holds no result.
        """
        folder = RunFolder(Path(run_dir))
        try:
            found = json.loads(folder.result.read_text(encoding="utf-8"))
            return cls(found["preset"], found["params"], found["metrics"], folder.path, tuple(found["notes"]))
        except FileNotFoundError:
            went = "its run is not over: run it again, and it goes on" if folder.record.is_file() else "no run is there"
            raise ForgeError(f"{folder.path} holds no result; {went}.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ForgeError(f"{folder.result} is not the result of a run ({error}).") from error

    def _table(self) -> Table:
        table = Table(("figure", "value"), title=f"Tuned with {self.preset!r}")
        for name, what in _SHOWN.items():
            if name in self.metrics and (not name.endswith("combined_score") or "llm_judge_score" in self.metrics):
                table.add(what, f"{self.metrics[name]:.4g}")
        where = f"adapter: {self.adapter_path}\nreport: {self.report_path}"
        table.footer = "\n".join([*self.compare().conclusions(), *self.notes, where])
        return table
