"""Samples and their tokens as a `datasets.Dataset`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .encode import Tokens
from .rows import Sample

if TYPE_CHECKING:
    from datasets import Dataset


def dataset(samples: Sequence[Sample], tokens: Sequence[Tokens], format: str, max_length: int | None) -> Dataset:
    """The rows for a trainer.

    Args:
        samples: what was said.
        tokens: of each.
        format: of the data set; names the columns.
        max_length: rows are cut to so many tokens; of preferences none are, since DPOTrainer tokenises.

    Raises:
        UnsupportedError: preferences whose messages have no type in common.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    columns: dict[str, Any] = {}
    if format != "preference":
        columns |= _tokens(tokens, max_length)
    columns |= {name: _said(values, format) for name, values in _conversation(samples, format).items()}
    if any(sample.tools for sample in samples):  # TRL reads them as JSON too, which Arrow cannot change
        columns["tools"] = pa.array([json.dumps(sample.tools) if sample.tools else None for sample in samples])
    if any(sample.options for sample in samples):
        columns["chat_template_kwargs"] = pa.array([sample.options or {} for sample in samples])
    return datasets.Dataset(pa.table(columns))


def _tokens(tokens: Sequence[Tokens], max_length: int | None) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa

    kept = [len(row.ids[:max_length]) for row in tokens]
    offsets = pa.array(np.concatenate([[0], np.cumsum(kept)]), pa.int32())
    ids = np.concatenate([np.asarray(row.ids[:max_length], np.int32) for row in tokens])
    learnt = np.concatenate([np.frombuffer(bytes(row.learnt[:max_length]), np.int8) for row in tokens])
    flat = {"input_ids": ids, "labels": np.where(learnt, ids, -100), "assistant_masks": learnt}
    return {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in flat.items()}


def _conversation(samples: Sequence[Sample], format: str) -> dict[str, list[Any]]:
    if format == "text":
        return {"text": [sample.answer for sample in samples]}
    if format in ("messages", "sharegpt"):
        return {"messages": [[*sample.prompt, *sample.answer] for sample in samples]}
    prompts, answers = [sample.prompt for sample in samples], [sample.answer for sample in samples]
    if format == "preference":
        return {"prompt": prompts, "chosen": answers, "rejected": [sample.rejected for sample in samples]}
    return {"prompt": prompts, "completion": answers}


def _said(values: list[Any], format: str) -> Any:
    """A column of conversations; as JSON where messages hold what has no type in common (arguments of tool calls)."""
    import pyarrow as pa

    called = any(isinstance(m, dict) and m.get("tool_calls") for said in values if isinstance(said, list) for m in said)
    try:
        if called and format != "preference":  # Arrow would give all arguments one type, and 1 come back as 1.0
            raise pa.ArrowTypeError("calls of tools")
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        if format == "preference":  # DPOTrainer reads the messages themselves
            raise UnsupportedError(
                f"The messages of these preferences have no type in common, as a data set needs ({error}). Write the "
                "arguments of tool calls as JSON text."
            ) from error
        return pa.array([json.dumps(value, ensure_ascii=False) for value in values])
