"""A plain function as a judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

from .fence import Sample
from .judge import Judge, Outcome
from .judgement import Judgement
from .reply import Unreadable, check

Scoring = Callable[..., Any]


class FunctionJudge(Judge):
    """Calls a function with the prompt (its text, or its messages), the answer and, if it takes one, the reference.

    Nothing is kept on disk: the function may change without its name changing.

    Args:
        function: Returns a score from 0 to 100; whatever it raises is a missing judgement.
        name: The judge's name.
        progress: Whether a bar is shown.
    """

    def __init__(self, function: Scoring, name: str, *, progress: bool = True) -> None:
        super().__init__(cache=False, progress=progress)
        self.function = function
        self._takes_reference = _can_be_called(function, "", "", reference=None)
        self.name = name
        self.model = getattr(function, "__qualname__", type(function).__qualname__)

    def outcomes(self, todo: dict[str, Sample]) -> Generator[tuple[str, Outcome], None, None]:
        """Call the function."""
        for key, sample in todo.items():
            yield key, Outcome(self._called(sample))

    def _called(self, sample: Sample) -> Judgement:
        conversation = [{"role": role, "content": content} for role, content in sample.prompt]
        only_text = len(conversation) == 1 and conversation[0]["role"] == "user"
        prompt: Any = conversation[0]["content"] if only_text else conversation
        try:
            more = {"reference": sample.reference} if self._takes_reference else {}
            return Judgement(check(self.function(prompt, sample.answer, **more)))
        except Unreadable as error:
            return Judgement(error=str(error))
        except Exception as error:  # noqa: BLE001  (a missing judgement, as for every judge)
            return Judgement(error=f"{type(error).__name__}: {error}"[:200])


def scores(function: Scoring) -> bool:
    """Whether it can be called as a function that scores."""
    return _can_be_called(function, "", "") or _can_be_called(function, "", "", reference=None)


def _can_be_called(function: Scoring, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
