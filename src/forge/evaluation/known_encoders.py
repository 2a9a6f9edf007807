"""What bert-score knows of well-known encoders: the layer that agrees best with people, and the baselines."""

from __future__ import annotations

import csv
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ForgeWarning, UnsupportedError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# The owners under which the hub lists models that bert-score's table, older than they are, knows without one.
_OWNERS = frozenset({"FacebookAI", "albert", "distilbert", "google-bert", "google-t5", "xlnet"})


def known_id(name: str, of_layers: int) -> str | None:
    """bert-score's id for a hub id or a folder; None where it is not certain which model that is.

    A folder counts when it is called as the hub, or its cache, calls the model, and the model has as many layers.

    >>> known_id("FacebookAI/roberta-large", 24), known_id("microsoft/deberta-base", 12)
    ('roberta-large', 'microsoft/deberta-base')
    >>> known_id("somebody/roberta-large", 24), known_id("roberta-large", 6)
    (None, None)
    """
    found = _named(name)
    return None if found is None or _other_depth(found, of_layers) else found


def default_layer(name: str, known_as: str | None, of_layers: int) -> int:
    """bert-score's layer for the model that it knows, else the last, with a warning."""
    from bert_score.utils import model2layers

    if known_as is not None:
        logger.info("%s: layer %d of %d, bert-score's choice for %s", name, model2layers[known_as], of_layers, known_as)
        return int(model2layers[known_as])
    warnings.warn(
        f"bert-score has no layer for {name}, so its last is used: {of_layers}. Pass num_layers={of_layers} to say "
        "that you want it, or a lower one: a middle layer agrees best with people for most models that it knows.",
        ForgeWarning,
        stacklevel=4,
    )
    return of_layers


def baseline(name: str, known_as: str | None, num_layers: int, lang: str) -> torch.Tensor:
    """bert-score's means of P, R and F1 over random pairs of sentences, (3,), from which rescaled scores count.

    Args:
        name: The model, for the message.
        known_as: `known_id` of it.
        num_layers: The layer that is compared.
        lang: Two letters.

    Raises:
        UnsupportedError: It has none for this model, language or layer.
    """
    import torch

    tables = {path.relative_to(_tables()).parts[0]: path for path in _baselines(known_as)}
    rows = _rows(tables[lang]) if lang in tables else []
    for row in rows:
        if int(row["LAYER"]) == num_layers:
            return torch.tensor([float(row[score]) for score in "PRF"])
    missing = f"layer {num_layers} of {known_as}" if rows else name
    there = f" It has some for this model in: {', '.join(sorted(tables))}." if tables and not rows else ""
    raise UnsupportedError(
        f"rescale_with_baseline=True: bert-score has no baseline for {missing} in {lang!r}.{there} Leave it out (raw "
        "scores rank systems alike), or use a model that has one, such as roberta-large in English."
    )


def _other_depth(known_as: str, of_layers: int) -> bool:
    """Whether a model cannot be the one that bert-score knows: it has another number of layers."""
    from bert_score.utils import model2layers

    return model2layers[known_as] > of_layers or any(len(_rows(path)) != of_layers + 1 for path in _baselines(known_as))


def _tables() -> Path:
    import bert_score

    return Path(bert_score.__file__).parent / "rescale_baseline"


def _baselines(known_as: str | None) -> list[Path]:
    """The files of a model, one a language."""
    return [] if known_as is None else sorted(_tables().glob(f"*/{known_as}.tsv"))


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def _named(name: str) -> str | None:
    """What the name alone says: an id, or a folder called so, also with -- for the slash, also in the hub's cache."""
    from bert_score.utils import model2layers

    path = Path(name)
    cached = [part.removeprefix("models--") for part in path.parts if part.startswith("models--")]
    last = cached[-1] if cached else path.name
    if not cached and "--" not in last and path.is_dir():
        candidates = ["/".join(path.parts[-2:]), last]
    else:
        owner, _, own = (last if cached or "--" in last else name).replace("--", "/").rpartition("/")
        # A model of that name under any other owner is somebody's own.
        candidates = [f"{owner}/{own}", *([own] if owner in _OWNERS or not owner else [])]
    return next((candidate for candidate in candidates if candidate in model2layers), None)
