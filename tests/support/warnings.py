"""A recorder of every warning that a block of code causes, and the check that only upstream's own are among them.

It sees Python warnings and records of level WARNING or above from the stack's loggers, also where upstream would have
said it only once per process: the caches behind `warning_once` are emptied on entry, so that a second test hears it.

    with WarningRecorder() as recorder:
        trainer.train()
    recorder.assert_clean()
"""

import logging
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

import torch

from support.upstream import ALLOWED, Upstream

LOGGERS = ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "torch", "huggingface_hub", "forge")

_matched: set[Upstream] = set()


@dataclass(frozen=True)
class Seen:
    """One warning: its text, its category or the logger's name and level, and where it was raised."""

    text: str
    source: str
    where: str

    def __str__(self) -> str:
        return f"[{self.source}] {self.text} ({self.where})"


class WarningRecorder:
    """Context manager; `seen` holds what came, each distinct warning once."""

    def __init__(self, allowed: tuple[Upstream, ...] = ALLOWED) -> None:
        self.allowed = allowed
        self._records: dict[Seen, None] = {}
        self._python = warnings.catch_warnings()
        self._handler = _Handler(self._records)
        self._undo_levels: list[tuple[logging.Logger, int]] = []
        self._handled: list[logging.Logger] = []
        self._torch_always = False

    @property
    def seen(self) -> list[Seen]:
        return list(self._records)

    @property
    def foreign(self) -> list[Seen]:
        """Return what the allow-list does not cover."""
        return [record for record in self.seen if not any(entry.matches(record.text) for entry in self.allowed)]

    def matching(self, part: str) -> list[Seen]:
        """Return the warnings whose text contains `part`."""
        return [record for record in self.seen if part in record.text]

    def assert_clean(self, *, besides: str | None = None) -> None:
        """Fail on every warning that is not in the allow-list, nor from the logger `besides`, which is the subject."""
        _matched.update(entry for entry in self.allowed if any(entry.matches(record.text) for record in self.seen))
        if foreign := [record for record in self.foreign if not (besides and record.source.startswith(f"{besides} "))]:
            raise AssertionError(
                "warnings that are not upstream's own (support/upstream.py):\n" + "\n".join(map(str, foreign))
            )

    def __enter__(self) -> "WarningRecorder":
        _forget_what_was_said_once()
        self._python.__enter__()
        warnings.simplefilter("always")
        self._torch_always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        warnings.showwarning = self._show
        for logger in _loggers():
            logger.addHandler(self._handler)
            self._handled.append(logger)
            if logger.getEffectiveLevel() > logging.WARNING:
                self._undo_levels.append((logger, logger.level))
                logger.setLevel(logging.WARNING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._handled:
            logger.removeHandler(self._handler)
        for logger, level in self._undo_levels:
            logger.setLevel(level)
        torch.set_warn_always(self._torch_always)
        self._python.__exit__(kind, error, trace)

    def _show(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
    ) -> None:
        self._records.setdefault(Seen(str(message), category.__name__, f"{filename}:{lineno}"))


class _Handler(logging.Handler):
    def __init__(self, records: dict[Seen, None]) -> None:
        super().__init__(level=logging.WARNING)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        source = f"{record.name} {record.levelname}"
        self.records.setdefault(Seen(record.getMessage(), source, f"{record.pathname}:{record.lineno}"))


def _loggers() -> list[logging.Logger]:
    """Return the roots, and every logger below them whose records would not reach a root."""
    roots = [logging.getLogger(name) for name in LOGGERS]
    below = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.split(".")[0] in LOGGERS and "." in name
    ]
    return roots + [logger for logger in below if not logger.propagate]


def _forget_what_was_said_once() -> None:
    from accelerate.logging import MultiProcessAdapter
    from torch._logging import _internal as torch_logging
    from transformers.utils import logging as _  # noqa: F401  (it is what gives Logger its warning_once)

    for function in (logging.Logger.warning_once, MultiProcessAdapter.warning_once, torch_logging.warning_once):
        function.cache_clear()


def stale() -> list[Upstream]:
    """Return the entries for the installed versions that no `assert_clean` of this process has needed."""
    return [entry for entry in ALLOWED if entry not in _matched and entry.version == _installed(entry.library)]


def _installed(library: str) -> str | None:
    try:
        return version(library).split("+")[0]
    except PackageNotFoundError:
        return None
