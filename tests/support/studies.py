"""Studies as forge writes them, made in a moment: nothing is trained."""

import math
import random
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, distribution_to_json

SPACE = {
    "learning_rate": FloatDistribution(1e-4, 1e-3, log=True),
    "lora_r": CategoricalDistribution([4, 8, 16, 32, 64]),
    "lora_dropout": CategoricalDistribution([0.0, 0.05]),
    "warmup_steps": FloatDistribution(0.0, 0.1),
}
BASE = 2.9


def loss_of(params: dict[str, Any], percent: int) -> float:
    """Best at a learning rate of 3e-4 and rank 16; falls towards the end."""
    distance = (math.log10(params["learning_rate"]) - math.log10(3e-4)) ** 2
    rank = 0.01 * abs(math.log2(params["lora_r"] / 16))
    return 2.3 + distance + rank + params["lora_dropout"] + 0.25 * (1 - percent / 100)


def make_study(count: int = 20, *, seed: int = 0, storage: Any = None, maximize: bool = False, **attrs: Any) -> Any:
    """A study with `count` finished trials: halved at 25 and 50 %, some fail, diverge or are too big."""
    import json

    with_settings = {
        "objective": "combined" if maximize else "loss",
        "preset": "qlora",
        "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        "sampler": "tpe",
        "seed": seed,
        "direction": "maximize" if maximize else "minimize",
        "space": {name: json.loads(distribution_to_json(one)) for name, one in SPACE.items()},
    }
    study = optuna.create_study(study_name="a study", storage=storage, direction="maximize" if maximize else "minimize")
    for name, value in {"settings": with_settings, "rungs": [25, 50, 100], "base_loss": BASE, "forge_study": 1}.items():
        study.set_user_attr(name, value)
    numbers = random.Random(seed)
    for number in range(count):
        study.add_trial(make_trial(number, numbers, maximize=maximize))
    for name, value in attrs.items():
        study.set_user_attr(name, value)
    return study


def make_trial(number: int, numbers: random.Random, *, maximize: bool = False, status: str | None = None) -> Any:
    params = {
        "learning_rate": 10 ** numbers.uniform(-4, -3),
        "lora_r": numbers.choice([4, 8, 16, 32, 64]),
        "lora_dropout": numbers.choice([0.0, 0.05]),
        "warmup_steps": numbers.uniform(0.0, 0.1),
    }
    rare = {5: "failed", 8: "diverged", 11: "infeasible", 17: "out_of_memory"}
    end = loss_of(params, 100)
    halved = "stopped" if number and end > 2.36 else "completed"
    status = status or rare.get(number % 20, halved)
    reached = {"completed": (25, 50, 100), "stopped": (25,) if end > 2.42 else (25, 50), "running": (25,)}.get(
        status, ()
    )
    sign = -1 if maximize else 1
    done = max(reached, default=10 if status in ("failed", "diverged", "out_of_memory") else 0)
    attrs = {
        "crew": 0,
        "engine": "packed",
        "prior": "preset" if number == 0 else "",
        "steps": done,
        "total_steps": 100,
        "tokens": 1000 * done,
        "seconds": 0.5 * done,
        "curve": [[percent, loss_of(params, percent) + 0.1] for percent in range(0, done + 1, 5)],
    }
    if status not in ("running",):
        attrs["status"] = status
    attrs |= WHY.get(status, {})
    value = None
    if status == "completed":
        attrs |= {"loss": end, "adapter": f"trials/{number}/adapter"}
        value = end
        if maximize:
            attrs |= {"combined_score": 1 - end / 10, "bert_score": 0.8, "llm_judge_score": 70.0}
            value = 1 - end / 10
    state = {"completed": "COMPLETE", "failed": "FAIL", "running": "RUNNING"}.get(status, "PRUNED")
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=value,
        params=params,
        distributions=SPACE,
        user_attrs=attrs,
        intermediate_values={percent: sign * loss_of(params, percent) for percent in reached},
    )


WHY = {
    "stopped": {"why": "Worse than half of those that came to 25%."},
    "diverged": {"why": "The training loss rose from 3.1 to 11.4."},
    "infeasible": {"why": "The estimate says that it needs 1.20 GiB more than there are."},
    "out_of_memory": {"why": "The GPU ran out of memory."},
    "failed": {
        "why": "RuntimeError: a tensor of the wrong shape",
        "trace": 'Traceback (most recent call last):\n  File "/home/ada/lib/train.py", line 3, in step\n'
        "    run()\nRuntimeError: a tensor of the wrong shape",
    },
}
