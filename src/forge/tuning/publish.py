"""The adapter as others will load it: its files, and the card that says what it is."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting.card import write_model_card

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from ..evaluation import Comparison
    from .result import TuningResult
    from .settle import Settled

_RESULTS = (
    ("Held-out loss", "loss", "loss", "lower"),
    ("BERTScore F1", "bertscore", "bert_score", "higher"),
    ("LLM judge, 0 to 100", "llm_judge", "llm_judge_score", "higher"),
    ("Combined score", "combined", "combined_score", "higher"),
)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write adapter and tokenizer into a folder, which is there only when all of it is."""
    beside = folder.with_name(f"{folder.name}.writing")
    for left in (beside, folder):
        shutil.rmtree(left, ignore_errors=True)
    model.save_pretrained(str(beside), selected_adapters=[model.active_adapter])
    tokenizer.save_pretrained(str(beside))
    beside.rename(folder)


def write_card(settled: Settled, result: TuningResult, comparison: Comparison) -> None:
    """Write the adapter's README.md."""
    record, data = settled.record, settled.data.report
    samples = len(comparison.results[0].samples)
    write_model_card(
        result.adapter_path,
        base_model=record["model"]["name"] or record["model"]["type"],
        objective=settled.preset.objective,
        preset=settled.preset.name,
        recipe={
            name: (choice.value, choice.reason)
            for name, choice in settled.preset.choices.items()
            if name != "report_to"  # the tuner's own affair
        },
        data={
            split.name: {
                "source": record["data"][split.name]["source"] if split.name == "train" else None,
                "rows": split.rows_out,
                "tokens": split.tokens,
                "fingerprint": record["data"][split.name]["fingerprint"],
            }
            for split in data.splits
        },
        results=_results(result, comparison),
        intervals=f"95%, paired bootstrap over {samples} samples",
        environment={**record["versions"], "hardware profile": record["hardware"]},
        limitations=[*comparison.conclusions(), *result.notes, f"One run, seed {record['seed']}."],
        chat=data.format != "text",
        own_tokenizer=True,
    )


def _results(result: TuningResult, comparison: Comparison) -> list[dict[str, Any]]:
    found = []
    for name, kind, key, better in _RESULTS:
        if key not in result.metrics:
            continue
        base, tuned = result.metrics.get(f"base_{key}"), result.metrics[key]
        line: dict[str, Any] = {"name": name, "type": kind, "base": base, "tuned": tuned}
        change = comparison.losses.get("tuned") if key == "loss" else None
        if change is not None and math.isfinite(change.low):  # few samples have no interval
            line["interval"] = (change.low, change.high)
        found.append({**line, "better": better})
    return found
