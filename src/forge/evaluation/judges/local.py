"""A transformers model on this machine as a judge. Nothing is sent anywhere, and nothing is fetched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from ...data import encode_prompt
from ...data.tokens import control_tokens
from ...errors import ConflictError, UnsupportedError
from ..generation import answer, encode_prompts
from .base_model import adapters_off, weights_digest
from .fence import Question, Sample, ask
from .judge import Judge, Outcome
from .judgement import Judgement
from .reply import Reply, Unreadable, read
from .trouble import Permanent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCHES_AT_A_TIME = 4


class LocalJudge(Judge):
    """Asks a causal language model: greedily, in left-padded batches, with its own chat template.

    Of a model with adapters the base judges, so that a model that is being trained is judged by what it was, and by the
    same judge before and after. A judge that is no better than the model that it judges cannot tell much. It is the
    default because it sends nothing anywhere.

    Args:
        model: A model; or the folder or hub id of one that is on this machine, which is loaded when it is first needed.
        tokenizer: Its tokenizer, for a model that is given as an object.
        batch_size: Questions at a time.
        max_new_tokens: Longest reply, in tokens.
        options: `rubric`, `cache` and `progress`, as for every judge.

    Raises:
        ConflictError: No model, no tokenizer or no chat template.
        UnsupportedError: The model is not on this machine, or its adapters changed the base, which can then not judge.
    """

    name = "local"

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 4,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if model is None:
            raise ConflictError(
                'The judge "local" needs a model: pass model= and tokenizer= (of adapters the base judges) or '
                'model="<folder or id>", or choose another judge by its name or by FORGE_JUDGE.'
            )
        for name, value in {"batch_size": batch_size, "max_new_tokens": max_new_tokens}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConflictError(f"{name}={value!r}: give a whole number of at least 1.")
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.longest = f"max_new_tokens={max_new_tokens}"
        self._model: Any = None
        self._digest = self._failed = ""
        if isinstance(model, (str, os.PathLike)):
            self.model = os.fspath(model)
            _look_for(self.model)
            self.tokenizer = tokenizer or _load("AutoTokenizer", self.model)
        else:
            if tokenizer is None:
                raise ConflictError('The judge "local" was given a model without its tokenizer: pass tokenizer= too.')
            self._model, self.tokenizer = model, tokenizer
            self.model = getattr(model.config, "_name_or_path", "") or type(model).__name__
            with adapters_off(model):  # refuses what it cannot undo, before any training
                pass
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConflictError(
                f"The tokenizer of {self.model!r} has no chat template, so the model does not follow instructions. "
                "Choose an instruction-tuned model as the judge."
            )

    @property
    def identity(self) -> tuple[str, ...]:
        """The judge's name, a digest of the base's weights, and what else its words depend on."""
        return (*super().identity[::2], self._digest, str(self.max_new_tokens), _tokenizer_digest(self.tokenizer))

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """Judge answers, as every judge does."""
        if self._model is None:
            try:
                self._model = _load("AutoModelForCausalLM", self.model, **_placement())
            except Exception as error:  # noqa: BLE001  (what was trained and measured so far is not lost for it)
                self._failed = f"{self.model} could not be loaded ({type(error).__name__}: {error})"[:200]
        if self._model is not None:
            self._digest = weights_digest(self._model)
        return super().score(*args, **kwargs)

    def outcomes(self, todo: dict[str, Sample]) -> Generator[tuple[str, Outcome], None, None]:
        """Judge samples, a few batches at a time, the longest first."""
        if self._model is None:
            raise Permanent(self._failed)
        encoded: dict[str, list[int]] = {}
        for key, sample in todo.items():
            found = self._encoded(sample, again=False)
            if isinstance(found, str):
                yield key, Outcome(Judgement(error=found))
            else:
                encoded[key] = found
        # By length, so that a batch pads little.
        order = sorted(encoded, key=lambda key: -len(encoded[key]))
        step = self.batch_size * _BATCHES_AT_A_TIME
        for start in range(0, len(order), step):
            part = {key: encoded[key] for key in order[start : start + step]}
            left = set(part)
            try:
                for key, outcome in self._judged_batch(part, todo):
                    left.remove(key)
                    yield key, outcome
            except RuntimeError as error:  # out of memory above all
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                yield from ((key, Outcome(Judgement(error=problem))) for key in part if key in left)

    def _judged_batch(self, part: dict[str, list[int]], todo: dict[str, Sample]) -> Iterator[tuple[str, Outcome]]:
        """Ask, and once more about those whose replies cannot be read."""
        spent: dict[str, tuple[Reply, ...]] = dict.fromkeys(part, ())
        for last in (False, True):
            problems: dict[str, str] = {}
            for (key, ids), reply in zip(part.items(), self._answered(list(part.values())), strict=True):
                spent[key] += (Reply(reply.text, len(ids), reply.tokens, cut=reply.cut),)
                try:
                    judgement = Judgement(*read(reply.text))
                except Unreadable as error:
                    problems[key] = f"{error}: it was cut off at {self.longest}" if reply.cut else str(error)
                else:
                    yield key, self._kept(key, Outcome(judgement, spent[key]))
            part = {}
            for key, problem in problems.items():
                again = problem if last else self._encoded(todo[key], again=True)
                if isinstance(again, str):
                    yield key, Outcome(Judgement(error=problem), spent[key])
                else:
                    part[key] = again
            if not part:
                return

    def _answered(self, encoded: list[list[int]]) -> list[Any]:
        with adapters_off(self._model) as base:
            return answer(base, self.tokenizer, encoded, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)

    def _encoded(self, sample: Sample, *, again: bool) -> list[int] | str:
        """The question in tokens, or why it cannot be asked."""
        controls = control_tokens(self.tokenizer).values()
        question = ask(sample, self.rubric, again=again, control_tokens=controls)
        try:
            return encode_prompts(
                self._model,
                self.tokenizer,
                [self._messages(question)],
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )[0]
        except ConflictError as error:
            room = "leave no room" in str(error)
            return "it does not fit into the judge's context" if room else str(error)[:200]

    def _messages(self, question: Question) -> list[dict[str, str]]:
        try:
            encode_prompt(self.tokenizer, question.messages)
        except UnsupportedError:  # templates without a system role (Gemma's) refuse it
            return question.merged
        return question.messages


def _tokenizer_digest(tokenizer: Any) -> str:
    """A digest of its chat template and its vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([tokenizer.chat_template, vocabulary]).encode()).hexdigest()[:16]


def _look_for(model: str) -> None:
    """Raise now what loading would raise after the training."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"The judge model={model!r} cannot be loaded from this machine ({str(error).splitlines()[0]:.160}). "
            'The judge "local" fetches nothing: download the model first, or pass its folder.'
        ) from error


def _load(auto: str, model: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, auto).from_pretrained(model, local_files_only=True, **options)


def _placement() -> dict[str, Any]:
    import torch

    # As hardware.py has it: most CPUs only emulate bf16.
    return {"dtype": "auto", "device_map": {"": 0}} if torch.cuda.is_available() else {"dtype": "float32"}
