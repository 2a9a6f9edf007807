"""A tiny model in a folder, rows that fit it, and a tuner around them that is over in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with its tokenizer, as `from_pretrained` wants them."""
    from support.models import text_model
    from support.tokenizer import tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    text_model("llama", layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Forty conversations, no two alike."""
    return chats(40)


@pytest.fixture
def make_tuner(tiny_folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> Callable[..., Any]:
    """`make_tuner(model=..., preset="lora", callbacks=(), **fields of TuningConfig)`; two epochs of 32 rows."""
    from forge.tuning import LoRATuner, TuningConfig

    def make(
        model: Any = None, train: Any = None, validation: Any = 8, *, preset: Any = "lora", **fields: Any
    ) -> LoRATuner:
        own = {name: fields.pop(name) for name in ("callbacks", "tokenizer") if name in fields}
        return LoRATuner(
            str(tiny_folder) if model is None else model,
            rows if train is None else train,
            validation,
            preset=preset,
            config=TuningConfig(**{**small(tmp_path / "run"), **fields}),
            **own,
        )

    return make


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {number}?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
        }
        for number in range(count)
    ]


def small(output_dir: Path) -> dict[str, Any]:
    """Fields of a TuningConfig for a run of eight steps on the CPU, without an encoder."""
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": 2,
        "effective_batch_size": 8,
        "max_length": 64,
        "overrides": {"lora_r": 4, "lora_dropout": 0.1, "logging_steps": 1},
        "bert_score": False,
        "max_eval_samples": 4,
        "max_new_tokens": 4,
    }


def searching(output_dir: Path) -> dict[str, Any]:
    """Fields of a TuningConfig for a search that is over in seconds: three trials in a pack, ten steps each."""
    return {
        **small(output_dir),
        "n_trials": 7,
        "pack": 3,
        "engine": "packed",
        "objective": "loss",
        "effective_batch_size": None,
        "overrides": {},
        "space": {
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "effective_batch_size": [8],
            "lora_r": [2, 4, 8],
            "lora_dropout": 0.0,
        },
    }
