"""The block of YAML at the top of a model card, which the hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import one_line
from .private import hub_id, last_part


def card_metadata(
    *,
    base: str | None,
    objective: str,
    name: str,
    license: str | None,
    data: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    tags: Sequence[str],
) -> str:
    """The block as YAML; see `forge.reporting.card.model_card`.

    Args:
        base: The base model's hub id; None for a local one.
        objective: "sft" or "dpo".
        name: The adapter's.
        license: As it was given.
        data: By part.
        results: The metrics, of which those that were measured become results of the hub.
        tags: More tags.
    """
    from huggingface_hub import ModelCardData

    sources = [str(part["source"]) for part in data.values() if part.get("source")]
    found = _eval_results(results, data)
    kinds: dict[str, Any] = _license(license)
    metadata = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=_tags(base, objective, tags),
        datasets=list(dict.fromkeys(filter(None, map(hub_id, sources)))) or None,
        model_name=name if found else None,  # the name of the results; on its own it is no field of a card
        eval_results=found or None,
        **kinds,
    )
    return metadata.to_yaml()


def _tags(base: str | None, objective: str, more: Sequence[str]) -> list[str]:
    own = [f"base_model:adapter:{base}"] if base else []
    return [*own, "lora", objective, "trl", "transformers", "forge", *(tag for tag in map(one_line, more) if tag)]


def _license(license: str | None) -> dict[str, str]:
    if not license:
        return {}
    name = one_line(license)
    return (
        {"license": name} if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) else {"license": "other", "license_name": name}
    )


def _eval_results(results: Sequence[Mapping[str, Any]], data: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    from huggingface_hub import EvalResult

    given = (data.get(part, {}).get("source") for part in ("validation", "train"))  # a part may be split off the other
    source = str(next(filter(None, given), ""))
    published = hub_id(source) if source else None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=published or "local",
            dataset_name=published or one_line(last_part(source)) or "held-out data",
            metric_type=one_line(result.get("type") or result["name"]),
            metric_name=one_line(result["name"]),
            metric_value=float(result["tuned"]),
        )
        for result in results
        if result.get("tuned") is not None and math.isfinite(result["tuned"])
    ]
