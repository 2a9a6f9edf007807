"""Tiny seeded data sets in the formats of TRL and of the plain Trainer, with something in them to learn.

Every row asks for the next letters of the alphabet, so a model that trains gets better and one that does not stays bad.
"""

import random
from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from support.tokenizer import tiny_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _questions(rows: int, seed: int) -> list[tuple[str, str, str]]:
    """Return (question, right answer, wrong answer) per row; lengths differ, so that padding happens."""
    rng = random.Random(seed)
    result = []
    for _ in range(rows):
        length, start = rng.randint(1, 5), rng.randrange(len(LETTERS) - 8)
        right = LETTERS[start + 1 : start + 1 + length]
        wrong = "".join(reversed(right)) + "z"
        result.append((f"After {LETTERS[start]}, {length}?", right, wrong))
    return result


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _build(rows: int, seed: int, row: Callable[[str, str, str], dict[str, object]]) -> Dataset:
    return Dataset.from_list([row(*question) for question in _questions(rows, seed)])


def sft_messages(rows: int = 16, *, seed: int = 0) -> Dataset:
    """Conversations in the column `messages`."""
    return _build(rows, seed, lambda q, right, _: {"messages": [_message("user", q), _message("assistant", right)]})


def sft_prompt_completion(rows: int = 16, *, seed: int = 0) -> Dataset:
    """Conversations in the columns `prompt` and `completion`."""
    return _build(
        rows,
        seed,
        lambda q, right, _: {"prompt": [_message("user", q)], "completion": [_message("assistant", right)]},
    )


def sft_text(rows: int = 16, *, seed: int = 0) -> Dataset:
    """Plain text in the column `text`."""
    return _build(rows, seed, lambda q, right, _: {"text": f"{q} {right}"})


def dpo_preferences(rows: int = 16, *, seed: int = 0) -> Dataset:
    """Conversations in the columns `prompt`, `chosen` and `rejected`."""
    return _build(
        rows,
        seed,
        lambda q, right, wrong: {
            "prompt": [_message("user", q)],
            "chosen": [_message("assistant", right)],
            "rejected": [_message("assistant", wrong)],
        },
    )


def lm_tokens(
    rows: int = 16, *, length: int = 32, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> Dataset:
    """`input_ids`, `attention_mask` and `labels` of one length for a plain Trainer; padding is not learnt."""
    tokenizer = tokenizer or tiny_tokenizer()

    def row(question: str, right: str, _: str) -> dict[str, object]:
        ids = tokenizer(f"{question} {right}{tokenizer.eos_token}")["input_ids"][:length]
        missing = length - len(ids)
        return {
            "input_ids": ids + [tokenizer.pad_token_id] * missing,
            "attention_mask": [1] * len(ids) + [0] * missing,
            "labels": ids + [-100] * missing,
        }

    return _build(rows, seed, row)
