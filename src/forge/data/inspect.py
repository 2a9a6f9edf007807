"""A look at one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ForgeError
from .encode import Encoder, encode_all
from .formats import FormatName, find_layout
from .rows import Sample, read_row
from .shown import Preview, tokens_of
from .source import load
from .way import find_way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(
    sample: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: FormatName | Literal["auto"] = "auto",
) -> Preview:
    """What is learnt from a sample, token by token: `print()` it, or leave it as a notebook cell's last line.

    Args:
        sample: a row of a prepared data set, or of one in any format that `prepare_dataset` recognises. A preference
            shows both answers.
        tokenizer: the model's.
        format: of a row that is not prepared, as for `prepare_dataset`.

    Raises:
        ForgeError: the row fits no format, or would be left out.
    """
    if "input_ids" in sample:
        ids = list(sample["input_ids"])
        labels = sample.get("labels")
        learnt = [True] * len(ids) if labels is None else [int(label) != -100 for label in labels]
        return Preview({"": tokens_of(tokenizer, ids, learnt)})
    rows = load([dict(sample)], name="sample")
    layout = find_layout(rows.columns, rows.first_values(), format)
    way = find_way(rows, layout, tokenizer)
    read = read_row(sample, 0, layout, chat=way.chat)
    if not isinstance(read, Sample):
        raise ForgeError(f"There is nothing to learn in this sample: {read}.")
    way.check([read])
    found = encode_all(Encoder(tokenizer, way.template, way.end), [read], "the sample")[0]
    if found.rejected is None:
        return Preview({"": tokens_of(tokenizer, found.ids, found.learnt)})
    rejected = [index >= found.prompt for index in range(len(found.rejected))]
    return Preview(
        {
            "chosen": tokens_of(tokenizer, found.ids, found.learnt),
            "rejected": tokens_of(tokenizer, found.rejected, rejected),
        }
    )
