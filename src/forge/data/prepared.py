"""Data that is ready for a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConflictError, UnsupportedError
from .inspect import preview
from .report import DataReport
from .shown import Preview
from .tokens import pad_token_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """What `prepare_dataset` returns.

    `SFTTrainer(train_dataset=data.train, eval_dataset=data.validation)` trains on exactly these labels, packed or not;
    so does `Trainer(..., data_collator=data.collator())`. Preferences go to `DPOTrainer` in the same way.

    Args:
        train: the rows to train on. `input_ids`, `labels` (-100 on what is not learnt) and `assistant_masks` (the same
            as a mask, which TRL 1.0 reads when it packs), beside the conversation itself (`messages`, `prompt` and
            `completion`, or `text`). Of preferences only `prompt`, `chosen` and `rejected`: DPOTrainer tokenises.
        validation: as many columns, None without a validation set.
        report: what was found and done.
    """

    train: Dataset
    validation: Dataset | None
    report: DataReport
    _tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)

    def preview(
        self, sample: int | Mapping[str, Any] = 0, *, split: Literal["train", "validation"] = "train"
    ) -> Preview:
        """What is learnt from a row, token by token.

        Args:
            sample: the row's number in `train` (or `validation`), or a row, prepared or in the format of these rows.
            split: which side the number counts in.

        Raises:
            ConflictError: there is no such row.
        """
        if isinstance(sample, Mapping):
            return preview(sample, self._tokenizer, format=self.report.format)
        try:
            sample = index(sample)  # NumPy's numbers too
        except TypeError:
            raise ConflictError(f"sample={sample!r} is neither a row nor the number of one.") from None
        rows = self.train if split == "train" else self.validation
        if rows is None:
            raise ConflictError("There is no validation set. Prepare with validation=0.05, or preview a training row.")
        if not -len(rows) <= sample < len(rows):
            raise ConflictError(f"There is no row {sample}: {split} has {len(rows):,} rows, counted from 0.")
        return preview(rows[sample], self._tokenizer, format=self.report.format)

    def collator(self) -> Any:
        """The collator for a plain `Trainer`: TRL's for language modelling, which pads labels with -100.

        Raises:
            UnsupportedError: preferences; DPOTrainer brings its own.
        """
        if self.report.format == "preference":
            raise UnsupportedError("A plain Trainer cannot learn preferences. Pass the rows to DPOTrainer.")
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(pad_token_id=pad_token_id(self._tokenizer))
