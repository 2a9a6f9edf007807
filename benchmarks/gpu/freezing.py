"""What freezing the lower layers saves on a GPU: time, memory, and what is read instead of computed.

A cell trains one random-init model in bf16 through the plain Trainer, with activation checkpointing, by one new trainer
after another: every variant once a round, the order of a round at random, so that a GPU that warms up slows all alike.
No TRL, data sets or quantisation are needed. The device is synchronised at the end of each step.

`all`, `truncated-F`, `cached-F` and `layers_to_transform-F` are as in benchmarks/frozen_variants.py; `offloaded-F` is
`cached-F` with `offload_prefix=True`. Their cached samples lie in the temporary folder (67 MB for each boundary of
llama-8b), which is emptied in the end, and are all read from it before the timed steps begin.

Of each variant: `step_s` (median of the timed steps of all rounds), `of_all` (the ratio within a round: median and
quartiles), `expected` and `of_expected` (benchmarks/layer_costs.py, from the layers' own time in the all-layer steps),
`tokens_per_s`, `max_allocated_gb` and `max_reserved_gb` in the timed steps, `whole_max_allocated_gb` from the beginning
(filling the cache), `nvml_process_gb`, `read` and `serving` (the cache's share of a step, by the host's clock; the keys
wait for the ids, so some of it is the wait for the batch), and `loss_difference` from the truncated run.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.frozen_variants import LINEAR, LORA, serving_times, share_of, sharing
from benchmarks.gpu.shapes import shape_config
from benchmarks.layer_costs import LayerCosts, StackClock
from benchmarks.ratios import ratios

VARIANTS = (
    *("all", "truncated-0.5", "truncated-0.75", "cached-0.5", "cached-0.75", "offloaded-0.5", "offloaded-0.75"),
    "layers_to_transform-0.5",
)
BATCHES = 2
ENOUGH_S = 380  # begin no further round that would end later


def cells(
    models: tuple[str, ...], *, batch: tuple[int, int], steps: tuple[int, int] = (5, 6), rounds: int = 4
) -> Iterator[dict[str, Any]]:
    """The cells.

    Args:
        models: names of shapes.
        batch: rows and length.
        steps: to warm up, which fills the cache and holds it against the layers once, and to time.
        rounds: how often each variant trains.
    """
    for model in models:
        yield {
            "group": "freezing",
            "model": model,
            "micro_batch": batch[0],
            "length": batch[1],
            "warm_up": steps[0],
            "timed": steps[1],
            "rounds": rounds,
        }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train every variant in turn."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(settings["model"]), dtype=torch.bfloat16)
    model.requires_grad_(False)
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rng, begin = random.Random(0), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serving_times() as serving:
        for turn in range(settings["rounds"]):
            if turn and (time.perf_counter() - begin) / turn * (turn + 1) > ENOUGH_S:
                break
            for variant in rng.sample(VARIANTS, len(VARIANTS)):
                serving.clear()
                runs[variant].append(_train(variant, model, settings, Path(folder), serving))
                gc.collect()  # trainers are full of cycles, and hold an optimizer
    return _result(settings, runs, len(model.model.layers))


def _train(
    variant: str, model: Any, settings: Mapping[str, Any], folder: Path, serving: dict[Any, float]
) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from forge import PrefixCache, setup_lp_lora_style
    from forge.compat import checkpointing_names
    from forge.models.layers import decoder_layers

    share, depth = share_of(variant), len(model.model.layers)
    only = {}
    if variant.startswith("layers_to_transform"):
        only = {"layers_to_transform": list(range(int(share * depth), depth))}
    torch.manual_seed(0)  # the same adapters, so that the same losses
    adapted = get_peft_model(sharing(model), LoraConfig(target_modules=LINEAR, **only, **LORA))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        max_steps=settings["warm_up"] + settings["timed"],
        per_device_train_batch_size=settings["micro_batch"],
        **checkpointing_names({"activation_checkpointing": True}),
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(adapted, arguments, train_dataset=_rows(settings, model.config.vocab_size))
    trainer.remove_callback(PrinterCallback)
    cache = None
    if variant.startswith(("truncated", "cached", "offloaded")):
        setup_lp_lora_style(trainer.model, share)
    if variant.startswith(("cached", "offloaded")):
        # One folder for both ways to read it: they hold the same states.
        cache = PrefixCache(folder / "prefix", max_gb=1, offload_prefix=variant.startswith("offloaded")).attach(trainer)
    clock = _clock(settings, serving)
    trainer.add_callback(clock)
    stack = StackClock(decoder_layers(trainer.model)) if variant == "all" else None
    trainer.train()
    steady = clock.result
    found = {
        "times": steady["steps_s"][settings["warm_up"] :],
        "steps_s": steady["steps_s"],
        **{name: steady[name] for name in ("max_allocated_gb", "max_reserved_gb", "nvml_process_gb")},
        "whole_max_allocated_gb": clock.filling_gb,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    if stack is not None:
        found["layers_s"] = stack.result(skip=settings["warm_up"], checkpointing=True)
        stack.remove()
    if cache is not None:
        spent = {name: s for (_, name), s in serving.items()}
        whole = sum(found["times"])
        found["read"] = sum(spent[name] for name in ("find_samples", "_look_up", "_read")) / whole
        found["serving"] = sum(spent[name] for name in ("_before", "_after", "at_boundary")) / whole
        found["cache_bytes"], found["hits"], found["misses"] = cache.nbytes, cache.hits, cache.misses
        cache.detach()
    return found


def _clock(settings: Mapping[str, Any], serving: dict[Any, float]) -> Any:
    import torch

    from benchmarks.steps import GB, StepClock, memory

    first, last = settings["warm_up"] + 1, settings["warm_up"] + settings["timed"] + 1

    class Clock(StepClock):
        """Forgets, when the timed steps begin, what memory and time the cache took to fill; reads at the last step."""

        filling_gb: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(self.ends) != first:
                return
            serving.clear()
            if torch.cuda.is_available():
                self.filling_gb = round(torch.cuda.max_memory_allocated() / GB, 3)
                torch.cuda.empty_cache()  # what was reserved to fill it, or by the variant before
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            super().on_step_end()
            if len(self.ends) == last:
                self.memory = memory()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            """Too late: a prefix that was offloaded has come back."""

    return Clock(warm_up=settings["warm_up"], tokens=settings["micro_batch"] * settings["length"])


def _rows(settings: Mapping[str, Any], vocabulary: int) -> Any:
    """Two batches of random tokens, of one length; one batch where that is all that the warm-up has time for."""
    import torch

    rows = settings["micro_batch"] * min(BATCHES, settings["warm_up"])
    ids = torch.randint(3, vocabulary, (rows, settings["length"]), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def _result(settings: Mapping[str, Any], runs: Mapping[str, list[dict[str, Any]]], depth: int) -> dict[str, Any]:
    tokens = settings["micro_batch"] * settings["length"]
    medians = {variant: [statistics.median(run["times"]) for run in done] for variant, done in runs.items()}
    forward, backward = (statistics.median(side) for side in zip(*(r["layers_s"] for r in runs["all"]), strict=True))
    rest = statistics.median(medians["all"]) - 2 * forward - backward
    costs = LayerCosts(forward, backward, rest, checkpointing=True)
    variants = {}
    for variant, done in runs.items():
        share, last = share_of(variant), done[-1]
        step_s = statistics.median(medians[variant])
        found = variants[variant] = {
            "step_s": _digits(step_s),
            "tokens_per_s": round(tokens / step_s, 1),
            "of_all": ratios(medians[variant], medians["all"]),
            **{name: _most(run[name] for run in done) for name in _PEAKS},
            "trainable_parameters": last["trainable_parameters"],
            "losses": [round(loss, 4) for loss in last["losses"]],
        }
        kind = variant.partition("-")[0]
        cached = kind in ("cached", "offloaded")
        found["expected"] = _digits(costs.step(int(share * depth) / depth, cached=cached) / costs.step())
        found["of_expected"] = _digits(found["of_all"]["median"] / found["expected"])
        if cached:
            uncached = runs[f"truncated-{share:g}"][-1]["losses"]
            found["loss_difference"] = max(abs(a - b) for a, b in zip(last["losses"], uncached, strict=True))
            found |= {name: _digits(statistics.median(run[name] for run in done)) for name in ("read", "serving")}
            found |= {name: last[name] for name in ("cache_bytes", "hits", "misses")}
    return {
        "variants": variants,
        "costs_s": {"forward": _digits(forward), "backward": _digits(backward), "rest": _digits(rest)},
        "layers": depth,
        "rounds_done": len(runs["all"]),
        "steps_s": runs["all"][-1]["steps_s"],
        "tokens_per_s": variants["all"]["tokens_per_s"],
        "losses": variants["all"]["losses"],
    }


_PEAKS = ("max_allocated_gb", "max_reserved_gb", "whole_max_allocated_gb", "nvml_process_gb")


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
