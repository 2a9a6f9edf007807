"""Samples and their tokens as a `datasets.Dataset`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
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
        UnsupportedError: preferences whose calls of tools have no type in common.
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
        columns["chat_template_kwargs"] = _objects([sample.options or {} for sample in samples], format)
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
    """A column of conversations or texts."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    for said in values:
        for message in said if isinstance(said, list) else ():
            for key, held in message.items():
                kinds.setdefault(key, set()).add(type(held))
    if all(len(held) == 1 and held <= {str, int, float, bool} for held in kinds.values()):
        with suppress(OverflowError):
            return pa.array(values)
    return _objects(values, format)


def _objects(values: list[Any], format: str) -> Any:
    """A column of what Arrow would change: it gives all values under a key one type, and all objects the same keys.

    As JSON, but for preferences, whose trainer reads the objects themselves.
    """
    import pyarrow as pa

    if format != "preference":
        return pa.array([json.dumps(value, ensure_ascii=False, default=str) for value in values])
    try:
        column = pa.array(values)
        read = [json.dumps(_bare(value), sort_keys=True, default=str) for value in column.to_pylist()]
        said = [json.dumps(_bare(value), sort_keys=True, default=str) for value in values]
        wrong = next((f"{a} would become {b}" for a, b in zip(said, read, strict=True) if a != b), None)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        wrong = str(error)
    if wrong is not None:
        raise UnsupportedError(
            "These preferences hold objects (calls of tools, or chat_template_kwargs) that have no type in common, as "
            f"a column of a data set needs: {wrong}. Give all of them the same keys and types, or render both sides to "
            "text first (tokenizer.apply_chat_template)."
        )
    return column


def _bare(value: Any) -> Any:
    """Messages without keys that hold nothing, which say nothing to a template; inside them a null is something."""
    if not isinstance(value, list):
        return value
    return [{key: held for key, held in message.items() if held is not None} for message in value]
