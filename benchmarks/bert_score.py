"""BERTScore on real conversations: forge's `BertScore` beside bert-score's own scorer and its `score` function.

Each round has other pairs, of what one person answers and what they say next, and runs all contenders in a new random
order; seconds are of CPU time, which other processes lengthen less. `times_forge` is the median of the ratios within a
round, above 1 where forge is faster. "forge, references seen" scores other candidates against the references of the
round, as when a tuned model follows its base. `score` loads the encoder at every call. `largest_difference` is over all
pairs, scores and rounds, between forge and the scorer. `python -m benchmarks.bert_score` writes its rows.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.provenance import installed_version
from benchmarks.runner import Suite, main

CELLS = tuple(
    {"pairs": pairs, "rounds": rounds, "batch_size": 64, "num_layers": 6, "threads": 1}
    for pairs, rounds in ((64, 9), (512, 5))
)
SUITE = Suite("bert_score", "benchmarks.bert_score:measure", CELLS, timeout_s=900)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time all contenders on MiniLM, in turn."""
    import bert_score
    import torch

    from forge.assets import minilm
    from forge.evaluation.bert_score import BertScore

    torch.set_num_threads(settings["threads"])
    folder, layers, size = str(minilm()), settings["num_layers"], settings["batch_size"]
    began = time.process_time()
    ours = BertScore(folder, layers, "cpu", batch_size=size)
    made = time.process_time()
    ours.load()
    loaded = time.process_time()
    scorer = bert_score.BERTScorer(folder, layers, device="cpu")
    # Of each contender the first call is slower.
    ours.score(["to warm up"], ["to be warm"])
    scorer.score(["to warm up"], ["to be warm"])

    def forge(answers: list[str], references: list[str], _: list[str]) -> Any:
        scores = ours.score(answers, references)
        return torch.tensor([scores.precision, scores.recall, scores.f1])

    def forge_again(_: list[str], references: list[str], others: list[str]) -> Any:
        return ours.score(others, references)

    def theirs(answers: list[str], references: list[str], _: list[str]) -> Any:
        return torch.stack(scorer.score(answers, references, batch_size=size))

    def reloading(answers: list[str], references: list[str], _: list[str]) -> Any:
        return bert_score.score(answers, references, folder, layers, device="cpu", batch_size=size)

    contenders: dict[str, Callable[..., Any]] = {"forge": forge, "BERTScorer": theirs, "bert_score.score": reloading}
    times: dict[str, list[float]] = {name: [] for name in [*contenders, "forge, references seen"]}
    rng, furthest = random.Random(0), 0.0
    for answers, references, others in _rounds(settings["pairs"], settings["rounds"]):
        found = {}
        for name in rng.sample(list(contenders), len(contenders)):
            times[name].append(-time.process_time())
            found[name] = contenders[name](answers, references, others)
            times[name][-1] += time.process_time()
        began_again = time.process_time()
        forge_again(answers, references, others)
        times["forge, references seen"].append(time.process_time() - began_again)
        furthest = max(furthest, float((found["forge"] - found["BERTScorer"]).abs().max()))
    return {
        "largest_difference": float(f"{furthest:.2g}"),
        "construct_s": round(made - began, 3),
        "load_s": round(loaded - made, 3),
        "bert_score": installed_version("bert-score"),
        "contenders": {
            name: {
                "median_s": round(statistics.median(own), 3),
                "times_forge": round(
                    statistics.median(mine / base for mine, base in zip(own, times["forge"], strict=True)), 2
                ),
            }
            for name, own in times.items()
        },
    }


def _rounds(pairs: int, rounds: int) -> list[tuple[list[str], list[str], list[str]]]:
    """Of each round: answers, references and other answers."""
    from forge.assets import conversations

    talks = [talk for talk in conversations() if len(talk) > 5]
    if len(talks) < pairs * rounds:
        raise ValueError(f"{len(talks)} conversations are long enough, and {pairs * rounds} are needed.")
    found = []
    for number in range(rounds):
        own = talks[number * pairs : (number + 1) * pairs]
        answers, references, others = ([talk[turn]["content"] for talk in own] for turn in (1, 3, 5))
        found.append((answers, references, others))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(SUITE))
