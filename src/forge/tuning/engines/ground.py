"""What all trials of a search share: the base, the rows and their order, the held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...errors import ConflictError
from .course import Course
from .order import row_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .contract import Task

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """A sample.

    Args:
        input_ids: its tokens.
        labels: the same, -100 where nothing is learnt.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]

    @cached_property
    def learnt(self) -> int:
        """Tokens whose prediction counts."""
        return sum(label != IGNORED for label in self.labels[1:])


def rows_of(dataset: Any) -> list[Row]:
    """The rows of a data set that `prepare_dataset` made."""
    ids, labels = dataset["input_ids"], dataset["labels"]
    return [Row(list(own), list(learnt)) for own, learnt in zip(ids, labels, strict=True)]


@dataclass(frozen=True)
class Ground:
    """What all trials of a search share.

    Args:
        model: the base, without adapters.
        tokenizer: the model's.
        train: the rows to train on.
        held_out: the samples whose loss decides at the rungs.
        micro_batch: rows of a trial that go through the model together.
        seed: of the rows' order.
        prefix_cache: whether what the layers compute that all trials freeze is kept.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Row]
    held_out: Sequence[Row]
    micro_batch: int
    seed: int = 42
    prefix_cache: bool = False

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return [len(row.input_ids) for row in self.train]

    @cached_property
    def held_out_tokens(self) -> int:
        """Learnt tokens of the held-out samples."""
        return sum(row.learnt for row in self.held_out)

    def course(self, task: Task) -> Course:
        """A trial's way through the rows.

        Raises:
            ConflictError: an effective batch that the micro-batch does not divide.
        """
        value = {name: choice.value for name, choice in task.preset.choices.items()}
        batch = int(value["effective_batch_size"])
        if batch % self.micro_batch:
            raise ConflictError(
                f"effective_batch_size={batch} is no multiple of the micro-batch of this search, {self.micro_batch}. "
                f"Take multiples of it, or set per_device_train_batch_size to one of their divisors."
            )
        order = row_order(
            self.lengths, micro_batch=self.micro_batch, epochs=float(value["num_train_epochs"]), seed=self.seed
        )
        most = int(value.get("max_steps") or -1)
        if most > 0:
            epochs = -(-most * batch // len(self.lengths))
            order = row_order(self.lengths, micro_batch=self.micro_batch, epochs=epochs, seed=self.seed)[: most * batch]
        return Course(tuple(order), batch, self.micro_batch)
