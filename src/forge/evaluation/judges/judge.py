"""What every judge does: check the samples, look into the cache, ask about the rest, count."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...assets import cache_folder
from ...errors import ConflictError, ForgeWarning
from .cache import Cache, key_of
from .fence import Question, Sample, ask
from .judgement import Judgement, JudgeResult, Usage
from .reply import Reply, Unreadable, read
from .rubric import Rubric
from .trouble import Permanent, Stopped, Trouble, without

_log = logging.getLogger(__name__)
_WORTH_A_BAR = 4


@dataclass(frozen=True)
class Outcome:
    """What became of one sample, and the replies that it took."""

    judgement: Judgement
    replies: tuple[Reply, ...] = ()


class Judge:
    """Scores answers from 0 to 100. One of your own overrides `reply`.

    >>> class Kind(Judge):
    ...     def reply(self, question):
    ...         return '{"reason": "I like it.", "score": 100}'
    >>> judge = Kind(cache=False, progress=False)
    >>> judge.score(["Hello?"], ["Hello!"]).describe()
    'LLM judge: mean 100.0 on 1 of 1 samples'

    Scores of a judge of your own are kept on disk only if its class says which `version` of it they are from:

    >>> class Kinder(Kind):
    ...     version = "1"

    Args:
        rubric: What to look for: a `Rubric`, or its criteria as a text.
        cache: Whether scores are kept on disk, in `forge.assets.cache_folder() / "judgements"`; or where.
        progress: Whether a bar is shown for more than a few samples.

    Raises:
        ConflictError: An empty rubric, a cache that cannot be used, or a place for one and no `version`.
    """

    name: str = ""
    model: str = ""
    """Both are part of what tells judges apart."""
    version: str = ""
    """Of a judge of your own: without one its scores are not kept on disk, as nobody could tell that its code has
    changed. Change it whenever the judge judges differently."""
    longest: str = "its greatest length"
    secrets: tuple[str, ...] = ()
    """What must not appear in an error; never part of `repr`, of the cache or of a result."""

    def __init__(
        self, *, rubric: Rubric | str | None = None, cache: bool | str | Path = True, progress: bool = True
    ) -> None:
        self.rubric = Rubric.of(rubric)
        self.progress = progress
        kept = bool(self.version) or type(self).__module__.startswith("forge.")
        if not kept and not isinstance(cache, bool):
            raise ConflictError(
                f"cache={str(cache)!r}: {type(self).__name__} has no version, so that its scores would be taken for "
                'those of its changed code. Set version = "1" in the class, or leave cache= out.'
            )
        place = cache_folder() / "judgements" if cache is True else cache
        self.cache = Cache(place) if kept and place is not False else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.model!r}, rubric={self.rubric.digest!r})"

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells this judge from others, in the cache and in a result. Never its key."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return (self.name or kind, self.model, f"{kind} {self.version}" if self.version else "")

    def reply(self, question: Question) -> Reply | str:
        """What the judge says to one question; an exception of any kind is a missing judgement.

        Args:
            question: `question.messages` as chat messages; `question.task` and `question.data` are their texts.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither `reply` nor `outcomes`.")

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], references: Sequence[str | None] | None = None
    ) -> JudgeResult:
        """Judge answers. Whatever fails is missing from the result, with the reason; it is never a score of 0.

        Args:
            prompts: Texts, or lists of chat messages of which the last was to be answered.
            answers: One a prompt.
            references: Good answers, where there are some.

        Returns:
            One judgement a sample, in their order.

        Raises:
            ConflictError: Lists of different lengths, none at all, or what is not text.
        """
        samples = _samples(prompts, answers, references)
        identity = self.identity
        keys = [key_of(identity, self.rubric.digest, sample) for sample in samples]
        known = self.cache.read(list(dict.fromkeys(keys))) if self.cache else {}
        todo = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in known}
        replies: list[Reply] = []
        given_up = ""
        with closing(self.outcomes(todo)) as outcomes:
            try:
                for key, outcome in self._shown(outcomes, len(todo)):
                    known[key] = outcome.judgement
                    replies += outcome.replies
            except Permanent as trouble:
                given_up = str(trouble)
        for key in todo:
            known.setdefault(key, Judgement(error=given_up or "the judge said nothing of it"))
        if given_up:
            missing = sum(known[key].score is None for key in keys)
            message = f"The judge {self.name!r} was given up on, {missing} of {len(keys)} samples have no score"
            warnings.warn(f"{message}: {given_up}.", ForgeWarning, stacklevel=2)
        usage = self._usage(replies, cached=len(keys) - len(todo))
        name = self.name or type(self).__name__
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        result = JudgeResult(name, self.model, self.rubric.digest, tuple(known[key] for key in keys), usage, digest)
        _log.info("%s", result.describe())
        return result

    def outcomes(self, todo: dict[str, Sample]) -> Generator[tuple[str, Outcome], None, None]:
        """Judge samples, in any order, and keep each score as soon as it is there.

        Args:
            todo: The samples by their keys in the cache.

        Raises:
            Permanent: No sample can be judged; those that were not yielded are missing.
        """
        for key, sample in todo.items():
            yield key, self._judged(key, sample, self.reply)

    def _judged(self, key: str, sample: Sample, reply: Callable[[Question], Reply | str]) -> Outcome:
        """Ask about one sample, and once more if the reply cannot be read."""
        replies: list[Reply] = []
        try:
            for again in (False, True):
                found = reply(ask(sample, self.rubric, again=again))
                replies.append(found if isinstance(found, Reply) else Reply(found))
                try:
                    return self._kept(key, Outcome(Judgement(*read(replies[-1].text)), tuple(replies)))
                except Unreadable as error:
                    problem = f"{error}: it was cut off at {self.longest}" if replies[-1].cut else str(error)
        except (Permanent, Stopped):
            raise
        except Trouble as trouble:
            problem = str(trouble)
        except Exception as error:  # noqa: BLE001  (whatever it was, the evaluation goes on)
            problem = without(self.secrets, f"{type(error).__name__}: {error}")[:200]
        return Outcome(Judgement(error=problem), tuple(replies))

    def _kept(self, key: str, outcome: Outcome) -> Outcome:
        if self.cache and outcome.judgement.score is not None:
            self.cache.write(key, outcome.judgement)
        return outcome

    def _shown(self, outcomes: Iterable[tuple[str, Outcome]], total: int) -> Iterator[tuple[str, Outcome]]:
        from tqdm.auto import tqdm

        hidden = not self.progress or total <= _WORTH_A_BAR
        with tqdm(total=total, desc="Judging", unit="sample", disable=hidden) as bar:
            for found in outcomes:
                bar.update()
                yield found

    def _usage(self, replies: Sequence[Reply], *, cached: int) -> Usage:
        counted = [reply for reply in replies if reply.prompt_tokens is not None]
        return Usage(
            requests=len(replies),
            prompt_tokens=sum(reply.prompt_tokens or 0 for reply in counted),
            completion_tokens=sum(reply.completion_tokens or 0 for reply in counted),
            cached=cached,
            uncounted=len(replies) - len(counted),
        )


def _samples(prompts: Any, answers: Any, references: Any) -> list[Sample]:
    for name, value in {"prompts": prompts, "answers": answers, "references": references}.items():
        if isinstance(value, (str, bytes)):
            raise ConflictError(f"{name} is one text: give a list with one for each sample.")
    prompts, answers = list(prompts), list(answers)
    references = [None] * len(answers) if references is None else list(references)
    if not len(prompts) == len(answers) == len(references):
        raise ConflictError(
            f"{len(prompts)} prompts, {len(answers)} answers, {len(references)} references: give one of each a sample."
        )
    if not prompts:
        raise ConflictError("There is nothing to judge: prompts and answers are empty.")
    rows = zip(prompts, answers, references, strict=True)
    return [Sample.of(*row, place=place) for place, row in enumerate(rows)]
