"""Two or more evaluations of the same samples, and what may be concluded from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConflictError
from ..reporting import Table
from .bootstrap import Difference, paired_bootstrap
from .ranking import Ranking, rank
from .report import notes, page
from .result import REPORT, EvaluatedSample, EvaluationResult
from .systems import SystemScores


@dataclass(frozen=True)
class Comparison:
    """What `compare_results` found.

    Args:
        results: The evaluations, in the order they were given.
        ranking: By BERTScore and the judge; None where there is no BERTScore.
        losses: The held-out loss of each further result less that of the first, by name: negative is better.
        remarks: What could not be compared, and why.
    """

    results: tuple[EvaluationResult, ...]
    ranking: Ranking | None
    losses: Mapping[str, Difference]
    remarks: tuple[str, ...] = ()

    def conclusions(self) -> list[str]:
        """What the numbers say, in sentences, and where they do not say it."""
        first = self.results[0].model
        said = []
        for name, change in self.losses.items():
            interval = f"{change.mean:+.4f} nats per token [{change.low:+.4f}, {change.high:+.4f}]"
            if change.low <= 0 <= change.high:
                said.append(f"Held-out loss: no difference can be shown between {name} and {first} ({interval}).")
            else:
                word = "lower" if change.mean < 0 else "higher"
                said.append(f"Held-out loss: that of {name} is {word} than that of {first} ({interval}).")
        return said + (self.ranking.conclusions() if self.ranking is not None else []) + list(self.remarks)

    def figures(self) -> list[dict[str, str]]:
        """The figures of each; the combined score is that of the ranking, on the samples that all were judged on."""
        ranked = (
            {row.name: row.combined for row in self.ranking.rows} if self.ranking and self.ranking.with_judge else {}
        )
        found = []
        for result in self.results:
            own = result.figures()
            own.pop("combined", None)
            found.append(own | ({"combined": f"{ranked[result.model]:.4f}"} if ranked else {}))
        return found

    def print(self) -> None:
        """Print the figures side by side, and the conclusions."""
        self._table().print()

    def __str__(self) -> str:
        return str(self._table())

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON knows it, with every result."""
        return {
            "conclusions": self.conclusions(),
            "losses": {
                name: {what: value if math.isfinite(value) else None for what, value in asdict(change).items()}
                for name, change in self.losses.items()
            },
            "ranking": None if self.ranking is None else self.ranking.to_dict(),
            "results": [result.to_dict() for result in self.results],
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `comparison.json` and `report.html` into a folder, which is made; return the report's path."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        (target / "comparison.json").write_text(text, encoding="utf-8", errors="replace")
        page(self.results, self).save(target / REPORT)
        return target / REPORT

    def _table(self) -> Table:
        figures = self.figures()
        table = Table(("figure", *(result.model for result in self.results)), title="Evaluation, side by side")
        for name in dict.fromkeys(name for one in figures for name in one):
            table.add(name, *(one.get(name, "-") for one in figures))
        table.footer = "\n".join([*self.conclusions(), *notes(self.results)])
        return table


def compare_results(*results: EvaluationResult) -> Comparison:
    """Compare evaluations of different models on the same samples.

    Differences are judged by a paired bootstrap over the samples, and what it cannot tell apart is called a tie. Scores
    with and without a judge are never ranked together.

    Args:
        results: Two or more, from `evaluate_model` on the same data with the same bounds; names must differ.

    Raises:
        ConflictError: Fewer than two, names that repeat, or samples that are not the same.
    """
    if len(results) == 1 and isinstance(results[0], (list, tuple)):
        return compare_results(*results[0])
    _check(results)
    remarks: list[str] = []
    losses = _losses(results, remarks)
    ranking = _ranking(results, remarks)
    for setting in ("max_new_tokens", "dtype"):
        values = [str(result.settings.get(setting)) for result in results]
        if len(set(values)) > 1:
            said = ", ".join(f"{result.model} {value}" for result, value in zip(results, values, strict=True))
            remarks.append(f"Not measured alike, so the difference may come from it: {setting} ({said}).")
    return Comparison(tuple(results), ranking, losses, tuple(remarks))


def _losses(results: tuple[EvaluationResult, ...], remarks: list[str]) -> dict[str, Difference]:
    """The differences from the first; none where they would not be of the same tokens, and then a remark."""
    first = results[0]
    tokens = [[one.digest for one in result.samples] for result in results]
    if any(own != tokens[0] for own in tokens) or any(result.loss.tokens != first.loss.tokens for result in results):
        remarks.append(
            "The held-out losses are not compared: they are of different tokens (another tokenizer, chat template or "
            "max_length)."
        )
        return {}
    learnt = [place for place, count in enumerate(first.loss.tokens) if count]
    if broken := [result.model for result in results if not math.isfinite(result.loss.mean)] if learnt else []:
        remarks.append(f"The held-out losses are not compared: that of {', '.join(broken)} is not finite.")
        return {}
    weights = [first.loss.tokens[place] for place in learnt]
    return {
        result.model: paired_bootstrap(
            [result.loss.per_sample[place] for place in learnt],
            [first.loss.per_sample[place] for place in learnt],
            weights=weights,
        )
        for result in results[1:]
        if learnt
    }


def _ranking(results: tuple[EvaluationResult, ...], remarks: list[str]) -> Ranking | None:
    """By BERTScore and the judge; None where one of them has no BERTScore, and then a remark."""
    without = [result.model for result in results if not result.bert_scores]
    if without:
        if len(without) < len(results) or any(result.judge_scores for result in results):
            remarks.append(
                f"There is no ranking: {', '.join(without)} {'has' if len(without) == 1 else 'have'} no BERTScore "
                "(score_answers(result, bert_score=...) adds it)."
            )
        return None
    return rank(
        {
            result.model: SystemScores(
                [one.bert_f1 for one in result.answered if one.bert_f1 is not None],
                [one.judge_score for one in result.answered] if result.judge_scores else None,
            )
            for result in results
        }
    )


def _check(results: tuple[EvaluationResult, ...]) -> None:
    if len(results) < 2:
        raise ConflictError(f"{len(results)} results given: a comparison needs two or more.")
    names = [result.model for result in results]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConflictError(
            f"Two results are called {repeated[0]!r}. Rename one: dataclasses.replace(result, model='tuned'); next "
            "time name them: evaluate_model(..., name='tuned')."
        )
    first = list(map(_asked, results[0].samples))
    for result in results[1:]:
        own = list(map(_asked, result.samples))
        if own != first:
            same = sum(a == b for a, b in zip(first, own, strict=False))
            raise ConflictError(
                f"{result.model!r} was evaluated on {len(own)} samples and {names[0]!r} on {len(first)}; {same} "
                "agree. Evaluate both on the same data with the same max_eval_samples."
            )
    encoders = {
        json.dumps(result.settings.get("bert_score"), sort_keys=True) for result in results if result.bert_scores
    }
    if len(encoders) > 1:
        raise ConflictError(f"BERTScores of different encoders cannot be compared: {', '.join(sorted(encoders))}.")
    judges = {json.dumps(result.settings.get("judge"), sort_keys=True) for result in results if result.judge_scores}
    if len(judges) > 1:
        raise ConflictError(f"Scores of different judges cannot be compared: {', '.join(sorted(judges))}.")


def _asked(sample: EvaluatedSample) -> tuple[str, str | None]:
    """What is the same for every model; of text without a question, its tokens."""
    return json.dumps(sample.prompt, sort_keys=True), sample.digest if sample.prompt is None else sample.reference
