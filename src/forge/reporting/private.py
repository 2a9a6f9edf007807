"""Texts without what is nobody else's business: credentials, and where things lie on this machine."""

from __future__ import annotations

import re
from pathlib import Path

_AUTHORITY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#\s'\"]*)@")
# A password with a bare "/" in it: what stands before the slash is then no host, for its port is no number.
_BROKEN_AUTHORITY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s'\"@]*:(?!\d*[/?#])[^\s'\"@:]*[/?#][^\s'\"]*@")
_SECRET_PARAMETER = re.compile(
    r"([?&;][^=&;#\s'\"]*(?:passw|pwd|token|secret|key|sig|credential)[^=&;#\s'\"]*=)[^&;#\s'\"]*", re.IGNORECASE
)
_KEY = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[abp]-|AIza)[A-Za-z0-9_-]{12,}")

# Relative paths with "/" alone: a regular expression is full of backslashes.
_PATH = re.compile(
    r"(?:file:/|/|~[\w.-]*(?:/|$)|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)"  # of whatever kind, and whatever follows
    r"|[\w.-]*[A-Za-z][\w.-]*(?:/[\w.-]+){2,}/?$"  # folders in folders
    r"|[\w.-]+(?:/[\w.-]+)*/[\w-]+\.(?:jsonl?|ndjson|csv|tsv|parquet|txt|arrow|safetensors|gguf|ya?ml)$"
)
_REST = r"[^\s'\"`,;:()<>|]*"
_PATH_IN_TEXT = re.compile(
    rf"(?<![\w/:.~<-])(?:(?:file:/+|~[\w.-]*/|/|\.{{1,2}}/|[A-Za-z]:[\\/]|\\\\){_REST}[\\/]{_REST}|~[A-Za-z][\w.-]*|~/{_REST})"
)
_HOMES = ("home", "Users", "users")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")
"""What the hub still finds under one word; any other word may be a folder or a kind of model."""
_IN_HUB_CACHE = re.compile(r"(?:^|[\\/])(models|datasets)--([\w.-]+?)(?:--([\w.-]+))?(?:[\\/]|$)")
_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".safetensors", ".gguf")


def without_credentials(text: str) -> str:
    """The text with no user and no password in its addresses, and no key in their queries.

    >>> without_credentials("https://ada:s3cret@mlflow.example.org:5000/api?token=abc")
    'https://mlflow.example.org:5000/api?token='
    """
    text = _AUTHORITY.sub(r"\1", text)
    text = _BROKEN_AUTHORITY.sub(r"\1", text)
    return _SECRET_PARAMETER.sub(r"\1", text)


def last_part(path: str) -> str:
    r"""The last part of a path of any system; of somebody's home nothing, for it has their name.

    >>> last_part("/home/ada/data/train.jsonl"), last_part(r"C:\Users\ada\train.jsonl"), last_part("/home/ada")
    ('train.jsonl', 'train.jsonl', '')
    """
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
    if not parts or parts[-1].startswith("~") or (len(parts) > 1 and parts[-2] in _HOMES):
        return ""
    if Path(path).expanduser() == Path.home():
        return ""
    return parts[-1]


def hub_id(name: str) -> str | None:
    """The hub id that a name stands for; None where it is a path, or a folder that is here.

    >>> hub_id("Qwen/Qwen3-0.6B"), hub_id("data/train.jsonl"), hub_id("/models/Qwen3-0.6B")
    ('Qwen/Qwen3-0.6B', None, None)
    >>> hub_id("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de")
    'Qwen/Qwen3-0.6B'
    """
    if cached := _IN_HUB_CACHE.search(name):
        return "/".join(part for part in cached.groups()[1:] if part)
    if "/" not in name:
        return name if name in _WITHOUT_OWNER and not Path(name).exists() else None
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(_DATA_SUFFIXES) or Path(name).exists():
        return None
    return None if ".." in name or "--" in name or name.endswith((".", "-")) else name


def public(text: str) -> str:
    """The text for others: no credentials and no keys, and of each path on this machine the last part.

    >>> public("read /home/ada/my/train.jsonl, tracked at http://ada:s3cret@host/x")
    'read train.jsonl, tracked at http://host/x'
    """
    text = _KEY.sub("[removed]", without_credentials(text))
    if _PATH.match(text.strip()) and "\n" not in text and not _reads_like_prose(text):
        return last_part(text.strip())
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return _PATH_IN_TEXT.sub(lambda found: last_part(found[0]), text)


def _reads_like_prose(text: str) -> bool:
    """Whether it is a sentence that begins with a path, rather than a path with a space in it."""
    return bool(re.search(r"[,;:] |\. [A-Z]", text))
