"""Stand-ins for what a user downloads, made without a network: a checkpoint folder with a tokenizer, and texts.

Weights are random and saved once per shape, in bf16 as published, so that what is measured loads them as a user does:
with `from_pretrained`, which quantises on the way. Memory and speed do not depend on their values.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import shape_config

WORDS = 1000
_SPECIAL = ("<pad>", "<bos>", "<eos>")


def checkpoint(shape: str) -> Path:
    """The folder of a shape's checkpoint; made first if it is not there, where it leaves no trace in a measurement."""
    import torch

    folder = Path(os.environ.get("FORGE_BENCH_CACHE", Path(tempfile.gettempdir(), "forge-bench")), shape)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            subprocess.run([sys.executable, "-m", "benchmarks.gpu.models", shape, str(folder)], check=True)
        else:
            _make_checkpoint(shape, folder)
    return folder


def _make_checkpoint(shape: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{shape}-"))
    try:
        model.save_pretrained(scratch)
        make_tokenizer().save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster: theirs is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_tokenizer() -> Any:
    """A tokenizer for which a text of N words is N tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *(f"w{n}" for n in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos)


def texts(rows: int, *, length: int, seed: int = 0) -> Any:
    """A data set with the column `text`; each row is at least `length` tokens, so that max_length cuts all alike."""
    from datasets import Dataset

    rng = random.Random(seed)
    return Dataset.from_dict({"text": [_words(rng, length) for _ in range(rows)]})


def preferences(rows: int, *, length: int, seed: int = 0) -> Any:
    """A data set with `prompt`, `chosen` and `rejected`; prompt and answer share `length` tokens evenly."""
    from datasets import Dataset

    rng = random.Random(seed)
    columns = {name: [_words(rng, length // 2) for _ in range(rows)] for name in ("prompt", "chosen", "rejected")}
    for name in ("chosen", "rejected"):
        columns[name] = [f" {text} {_words(rng, 1)}" for text in columns[name]]
    return Dataset.from_dict(columns)


def _words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(count))


if __name__ == "__main__":
    _make_checkpoint(sys.argv[1], Path(sys.argv[2]))
