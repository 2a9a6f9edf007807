"""What freezing the lower layers saves, on the CPU: steps, and whole runs of three epochs, beside the usual ways.

Models: SmolLM2-135M on real conversations, and a random-init llama of 24 layers with a vocabulary of 512 ("deep"), in
which the layers are nearly all of a step. fp32, one thread, the real SFTTrainer with TRL's defaults. What is compared,
and how the peers are built: frozen_variants.py. All variants train in one process, a step of each in turn
(taking_turns.py), so that a busy machine slows all alike.

`steps`: one step of each per round, activation checkpointing on (TRL's default) or off, all rows of one length. A
cached variant's samples are all in the cache by then, and the operating system has its file in memory. A row has, per
variant:
- `of_all`, `cpu_of_all`: its step as a share of the all-layer step's, by the clock and by CPU time; the median and the
  quartiles over the rounds. CPU time is free of other processes' turns on the core, so the goals are read there.
- `expected`: what it should be by the F, B and R of the all-layer steps (layer_costs.py); `of_expected` is
  `cpu_of_all` : `expected`.
- `saved_below_bytes`, `saved_bytes`, `visited`, `forwards`: what the frozen layers and what the whole model kept for
  backward in one step, how many layers backward visited, and how often one ran (tests/support/backward.py).
- `serving`: what the cache costs, by the clock, as a share of the variant's own step: `read` is making keys, looking up
  and copying, `all` is everything that PrefixCache does.

`epochs`: three whole epochs of each, turns as before, from the beginning of `train()` to its end: data, filling the
cache in the first epoch, bringing it to the disk. `of_all` is the whole time's ratio to the all-layer run's; attaching
the cache counts too. `loss_difference` is the largest between a cached run's step and the same step without the cache,
`steps_that_differ` are those in which there is any. Rows of other lengths meet in every epoch's batches, and a matrix
product of another shape rounds otherwise, so a last bit may differ; where all have one length, none can.

A row says how many rounds there were and how busy the machine was. Goals: see `GOALS`.
`python -m benchmarks.freezing` writes results/freezing.jsonl.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.runner import Suite, main

# what: variant, key in its result, limit. Of the "deep" model, with checkpointing for the nominal shares.
GOALS: dict[str, tuple[tuple[str, str, float], ...]] = {
    "steps": (
        ("truncated-0.5", "of_expected", 1.10),
        ("truncated-0.75", "of_expected", 1.10),
        ("cached-0.5", "of_expected", 1.15),
        ("cached-0.75", "of_expected", 1.15),
        ("truncated-0.5", "saved_below_bytes", 0),
        ("truncated-0.75", "saved_below_bytes", 0),
        ("cached-0.5", "saved_below_bytes", 0),
        ("cached-0.75", "saved_below_bytes", 0),
        ("cached-0.5", "serving.read", 0.05),
        ("cached-0.75", "serving.read", 0.05),
    ),
    "nominal": (
        ("truncated-0.5", "cpu_of_all.median", 1.10 * 2 / 3),
        ("cached-0.5", "cpu_of_all.median", 1.15 * 0.5),
        ("cached-0.75", "cpu_of_all.median", 1.15 * 0.25),
    ),
    "epochs": (
        ("cached-0.5", "of_all", 0.65),
        ("cached-0.75", "of_all", 0.50),
        ("cached-0.5", "loss_difference", 0.0),
        ("cached-0.75", "loss_difference", 0.0),
    ),
}
WARM_UP = 3  # one step fills the cache, one holds it against the layers, one is probed
_ROWS = {"deep": {"rows": 4, "lengths": [128, 128]}, "smollm2": {"rows": 1, "lengths": [128, 128]}}
_STEPS = {
    (model, train, checkpointing): {
        **{"measures": "steps", "model": model, "train": train, "checkpointing": checkpointing},
        **_ROWS[model],
        "rounds": 12 if model == "deep" else 8,
    }
    for model in _ROWS
    for train, checkpointing in (("lora", True), ("lora", False), ("full", True))
}
CELLS = (
    _STEPS["deep", "lora", True],
    {"measures": "epochs", "model": "deep", "checkpointing": True, "rows": 4, "lengths": [64, 128], "batches": 6},
    {"measures": "epochs", "model": "deep", "checkpointing": True, "rows": 4, "lengths": [128, 128], "batches": 3},
    _STEPS["smollm2", "lora", True],
    _STEPS["deep", "full", True],
    _STEPS["deep", "lora", False],
    _STEPS["smollm2", "full", True],
    _STEPS["smollm2", "lora", False],
    {"measures": "epochs", "model": "smollm2", "checkpointing": True, "rows": 1, "lengths": [64, 128], "batches": 6},
    # longer: the cache is proved once per run, which 18 steps feel
    {"measures": "epochs", "model": "smollm2", "checkpointing": True, "rows": 1, "lengths": [64, 128], "batches": 14},
)
SUITE = Suite(
    "freezing", "benchmarks.freezing:measure", tuple({**cell, "threads": 1} for cell in CELLS), timeout_s=1500
)
ENOUGH_S = 240  # begin no further round of steps after this time


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train all variants, in turn."""
    import torch

    from benchmarks.frozen_variants import serving_times

    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as folder, serving_times() as serving:
        found = (_steps if settings["measures"] == "steps" else _epochs)(settings, Path(folder), serving)
    return found | {"goals": goals(settings, found["variants"]), "load_at_end": round(os.getloadavg()[0], 1)}


def goals(settings: Mapping[str, Any], variants: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The goals that a cell speaks of, each with what was measured.

    >>> variants = {f"cached-{share}": {"of_all": 0.5, "loss_difference": 0.0} for share in (0.5, 0.75)}
    >>> [goal["met"] for goal in goals({"measures": "epochs", "model": "deep"}, variants)]
    [True, True, True, True]
    """
    kinds = [settings["measures"]]
    if settings["measures"] == "steps" and settings["train"] == "full":
        kinds = []
    elif settings["measures"] == "steps" and settings["checkpointing"] and settings["model"] == "deep":
        kinds.append("nominal")
    found = []
    for variant, name, limit in (goal for kind in kinds for goal in GOALS[kind]):
        value: Any = variants[variant]
        for part in name.split("."):
            value = value[part]
        found.append({"variant": variant, "what": name, "is": value, "limit": _digits(limit), "met": value <= limit})
    return found


def _trainers(
    variants: tuple[str, ...], settings: Mapping[str, Any], folder: Path, **arguments: Any
) -> tuple[dict[str, Any], dict[str, float], dict[str, Any], int]:
    """Trainers by variant, the seconds that attaching a cache took, the caches, and how many layers there are."""
    from benchmarks.frozen_variants import build, dataset, load

    model, tokenizer = load(settings["model"])
    first, last = settings["lengths"]
    data = dataset(settings["model"], settings["rows"] * settings.get("batches", 1), (first, last))
    arguments |= {
        "output_dir": str(folder / "trainer"),
        "use_cpu": True,
        "bf16": False,  # the default of SFTConfig, in which CPUs are slow
        "per_device_train_batch_size": settings["rows"],
        "max_length": last,
        "activation_checkpointing": settings["checkpointing"],
        "learning_rate": 1e-4,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainers, attach_s, caches = {}, {}, {}
    for variant in variants:
        begin = time.perf_counter()
        trainers[variant], caches[variant] = build(
            variant, model, folder, arguments, train_dataset=data, processing_class=tokenizer
        )
        if caches[variant] is not None:  # once more, alone
            caches[variant].detach()
            begin = time.perf_counter()
            caches[variant].attach(trainers[variant])
            attach_s[variant] = time.perf_counter() - begin
    return trainers, attach_s, caches, len(model.model.layers)


def _steps(settings: Mapping[str, Any], folder: Path, serving: dict[Any, float]) -> dict[str, Any]:
    from benchmarks.frozen_variants import VARIANTS, share_of
    from benchmarks.layer_costs import LayerCosts, StackClock
    from benchmarks.ratios import ratios
    from benchmarks.taking_turns import Turns
    from forge.models.layers import decoder_layers

    begin = time.perf_counter()
    variants = VARIANTS[settings["train"]]
    steps = WARM_UP + settings["rounds"]
    trainers, _, caches, depth = _trainers(variants, settings, folder, max_steps=steps)
    watches = {variant: _Watch(trainer, probe_at=WARM_UP) for variant, trainer in trainers.items()}
    clock = StackClock(decoder_layers(trainers["all"].model))
    turns = Turns(trainers)
    for _ in range(WARM_UP):
        turns.round()
    serving.clear()
    rounds = 0
    while rounds < settings["rounds"] and time.perf_counter() - begin < ENOUGH_S:
        turns.round()
        rounds += 1
    reading = {
        variant: {name: s for (thread, name), s in serving.items() if thread == watches[variant].thread}
        for variant in variants
    }
    turns.stop()
    clock.remove()
    times = {variant: found[WARM_UP : WARM_UP + rounds] for variant, found in turns.steps.items()}
    cpu = {variant: [step.cpu_s for step in found] for variant, found in times.items()}
    wall = {variant: [step.wall_s for step in found] for variant, found in times.items()}
    forward, backward = clock.result(skip=WARM_UP, checkpointing=settings["checkpointing"])
    spent = forward * (2 if settings["checkpointing"] else 1) + backward
    costs = LayerCosts(forward, backward, statistics.median(cpu["all"]) - spent, settings["checkpointing"])
    results = {}
    for variant in variants:
        below = int(share_of(variant) * depth)
        result: dict[str, Any] = {
            "step_s": _digits(statistics.median(wall[variant])),
            "cpu_s": _digits(statistics.median(cpu[variant])),
            "of_all": ratios(wall[variant], wall["all"]),
            "cpu_of_all": ratios(cpu[variant], cpu["all"]),
            "frozen_layers": below,
            **watches[variant].probed(below),
            "trainable_parameters": sum(p.numel() for p in trainers[variant].model.parameters() if p.requires_grad),
        }
        if variant.startswith(("truncated", "cached", "layers_to_transform")):
            result["expected"] = _digits(costs.step(below / depth, cached="cached" in variant) / costs.step())
            result["of_expected"] = _digits(result["cpu_of_all"]["median"] / result["expected"])
        if variant.startswith("full-"):
            result["of_full_truncated"] = ratios(cpu[variant], cpu["full-truncated-0.5"])["median"]
        if "cached" in variant:
            result["serving"] = _serving(reading[variant], sum(wall[variant]), rounds)
            result["hits"], result["misses"] = caches[variant].hits, caches[variant].misses
        results[variant] = result
    return {
        "rounds_done": rounds,
        "layers": depth,
        "tokens": settings["rows"] * settings["lengths"][1],
        "costs_s": {name: _digits(getattr(costs, name)) for name in ("forward", "backward", "rest")},
        "variants": results,
    }


def _epochs(settings: Mapping[str, Any], folder: Path, serving: dict[Any, float]) -> dict[str, Any]:
    from benchmarks.frozen_variants import EPOCHS, share_of
    from benchmarks.taking_turns import Turns

    trainers, attach_s, caches, depth = _trainers(EPOCHS, settings, folder, num_train_epochs=3)
    watches = {variant: _Watch(trainer) for variant, trainer in trainers.items()}
    turns = Turns(trainers)
    while turns.round():
        pass
    whole, steps = turns.whole, settings["batches"]
    results: dict[str, Any] = {}
    for variant in EPOCHS:
        losses, per_step = watches[variant].losses, turns.steps[variant]
        extra = attach_s.get(variant, 0.0)
        found = results[variant] = {
            "run_s": _digits(whole[variant].wall_s + extra),
            "run_cpu_s": _digits(whole[variant].cpu_s + extra),
            "of_all": _digits((whole[variant].wall_s + extra) / whole["all"].wall_s),
            "cpu_of_all": _digits((whole[variant].cpu_s + extra) / whole["all"].cpu_s),
            "epochs_of_all": [
                _digits(
                    sum(step.cpu_s for step in per_step[epoch * steps : (epoch + 1) * steps])
                    / sum(step.cpu_s for step in turns.steps["all"][epoch * steps : (epoch + 1) * steps])
                )
                for epoch in range(3)
            ],
            "loss_first": losses[0],
            "loss_last_epoch": statistics.fmean(losses[-steps:]),
        }
        if "cached" in variant:
            other = watches[f"truncated-{share_of(variant):g}"].losses
            found["loss_difference"] = max(abs(a - b) for a, b in zip(losses, other, strict=True))
            found["steps_that_differ"] = [i for i, (a, b) in enumerate(zip(losses, other, strict=True)) if a != b]
            found["attach_s"] = _digits(extra)
            found["cache_bytes"] = caches[variant].nbytes
            found["hits"], found["misses"] = caches[variant].hits, caches[variant].misses
            mine = {name: s for (thread, name), s in serving.items() if thread == watches[variant].thread}
            found["serving_s"] = {name: _digits(s) for name, s in sorted(mine.items())}
    return {"steps": 3 * steps, "layers": depth, "variants": results}


class _Watch:
    """Sees what goes through a trainer's `training_step`: the losses, the thread, and one step under a probe.

    Args:
        trainer: whose method is wrapped, on this object only.
        probe_at: the step that is probed, counted from 1.
    """

    def __init__(self, trainer: Any, *, probe_at: int = 0) -> None:
        from tests.support.backward import BackwardProbe

        self.losses: list[float] = []
        self.thread = 0
        self._probe: Any = None
        inner = trainer.training_step

        def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
            import threading

            self.thread = threading.get_ident()
            if len(self.losses) + 1 == probe_at:
                with BackwardProbe(model) as self._probe:
                    loss = inner(model, *args, **kwargs)
            else:
                loss = inner(model, *args, **kwargs)
            self.losses.append(float(loss))
            return loss

        trainer.training_step = training_step

    def probed(self, depth: int) -> dict[str, int]:
        """What the layers below `depth` kept for backward, what everything kept, and where backward was."""
        saved = self._probe.saved_bytes
        found = {
            "saved_below_bytes": sum(saved[index] for index in range(depth)),
            "saved_bytes": sum(saved.values()),
            "visited": len(self._probe.visited),
            "forwards": sum(self._probe.forwards.values()),
        }
        self._probe._saved.clear()  # it holds them
        return found


def _serving(spent: Mapping[str, float], steps_s: float, rounds: int) -> dict[str, Any]:
    read = sum(spent[name] for name in ("find_samples", "_look_up", "_read"))
    every = sum(spent[name] for name in ("_before", "_after", "at_boundary"))
    return {
        "read": _digits(read / steps_s),
        "all": _digits(every / steps_s),
        "ms": {name: _digits(1000 * s / rounds) for name, s in sorted(spent.items())},
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    sys.exit(main(SUITE))
