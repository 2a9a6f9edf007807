"""What EMACallback and MonitorCallback cost on a GPU, where a read of the host's stalls the queue of kernels.

A `train` cell loads a model once and trains it with the LoRA preset, by one new trainer after another: every variant of
callbacks once a round, the order of a round at random, so that a GPU that warms up slows all alike. Half of the rounds
synchronise the device after every step (`step_s`, a median: the cost of kernels and reads, not of losing the queue's
lead), half only before the first timed step and after the last (`flowing_step_s`: what a user waits for). The overheads
are medians of the ratios to "none" within a round. A slow model gets fewer rounds, two at least.

An `update` cell is one update of an average of 50 million numbers on the GPU, by forge and by torch's swa_utils, with
the device synchronised around it (benchmarks/ema_update.py). `sees_queued` says whether an update averages the weights
as an optimizer's kernels, still in the queue, will leave them: a copy to the CPU that nobody waits for does not.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.models import checkpoint, make_tokenizer, texts

if TYPE_CHECKING:
    import torch

    from benchmarks.averages import Make

VARIANTS = ("none", "ema", "ema-cpu", "monitor", "both")
LOGGING_STEPS = 10
ENOUGH_S = 360  # begin no further pair of rounds that would end later


def cells(
    models: tuple[str, ...], *, sft: tuple[int, int], steps: tuple[int, int] = (3, 10), rounds: int = 4
) -> Iterator[dict[str, Any]]:
    """The cells of training.

    Args:
        models: names of shapes.
        sft: micro-batch and length.
        steps: to warm up, and to time; of 10 one has an entry of the log.
        rounds: how often each variant trains; an even number.
    """
    for model in models:
        yield {
            "group": "callbacks",
            "measures": "train",
            "model": model,
            "preset": "lora",
            "by": "forge",
            "micro_batch": sft[0],
            "length": sft[1],
            "warm_up": steps[0],
            "timed": steps[1],
            "rounds": rounds,
        }


def update_cells() -> Iterator[dict[str, Any]]:
    """The cells of the update alone."""
    for shape in ("lora", "dense"):
        for dtype in ("fp32", "bf16"):
            yield {"group": "callbacks", "measures": "update", "shape": shape, "dtype": dtype, "repeats": 50}


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train under every variant in turn, or update an average."""
    return _update(settings) if settings["measures"] == "update" else _train(settings)


def _train(settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from forge import get_preset

    folder = str(checkpoint(settings["model"]))
    step_s: dict[str, list[float]] = defaultdict(list)
    flowing: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = defaultdict(list)
    rng, begin, done = random.Random(0), time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as output:
        preset = get_preset("lora", model=folder, **_arguments(settings, output))
        model = AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs())
        for turn in range(settings["rounds"]):
            synchronise, spent = turn % 2 == 0, time.perf_counter() - begin
            if turn and synchronise and spent / turn * (turn + 2) > ENOUGH_S:
                break
            for variant in rng.sample(VARIANTS, len(VARIANTS)):
                torch.manual_seed(0)  # the same adapters, so that the same losses
                trainer, clock = _trainer(variant, model, preset, settings, Path(output), synchronise=synchronise)
                trainer.train()
                times = clock.steps[settings["warm_up"] :]
                if synchronise:
                    step_s[variant].append(statistics.median(times))
                    steps[variant] = clock.steps
                else:
                    flowing[variant].append(sum(times) / len(times))
                peaks[variant].append(clock.peak_gb)
                losses[variant] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
                model = trainer.model.unload()  # the base, without adapters
                del trainer, clock
                gc.collect()  # trainers are full of cycles, and hold an optimizer
            done = turn + 1
    tokens = settings["micro_batch"] * settings["length"]
    return {
        "variants": {
            variant: {
                "step_s": _digits(statistics.median(step_s[variant])),
                "overhead": _overhead(step_s, variant),
                "flowing_step_s": _digits(statistics.median(flowing[variant])),
                "flowing_overhead": _overhead(flowing, variant),
                "flowing_rounds_s": [_digits(value) for value in flowing[variant]],
                "max_allocated_gb": round(max(peaks[variant]), 3),
                "losses": [round(loss, 4) for loss in losses[variant]],
            }
            for variant in VARIANTS
        },
        "steps_s": [_digits(step) for step in steps["none"]],
        "tokens_per_s": round(tokens / statistics.median(flowing["none"]), 1),
        "losses": [round(loss, 4) for loss in losses["none"]],
        "trainable_parameters": trainable,
        "rounds_done": done,
    }


def _arguments(settings: Mapping[str, Any], output: str) -> dict[str, Any]:
    steps = settings["warm_up"] + settings["timed"]
    return {
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": settings["micro_batch"],
        "gradient_accumulation_steps": 1,
        "max_length": settings["length"],
        "logging_steps": LOGGING_STEPS if settings["timed"] >= LOGGING_STEPS else 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _trainer(
    variant: str, model: Any, preset: Any, settings: Mapping[str, Any], output: Path, *, synchronise: bool
) -> tuple[Any, Any]:
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from forge.callbacks import EMACallback, MonitorCallback

    callbacks: list[Any] = []
    if variant in ("ema", "ema-cpu", "both"):
        callbacks.append(EMACallback(device="cpu" if variant == "ema-cpu" else None))
    monitor = MonitorCallback(report_dir=output / "report", display=False) if variant in ("monitor", "both") else None
    trainer = SFTTrainer(
        model=model,
        args=preset.get_sft_config(),
        peft_config=preset.get_lora_config(),
        callbacks=[*preset.get_callbacks(), *callbacks],
        processing_class=make_tokenizer(),
        train_dataset=texts(settings["micro_batch"] * preset.get_sft_config().max_steps, length=settings["length"]),
    )
    if monitor is not None:
        monitor.attach(trainer)
    trainer.remove_callback(PrinterCallback)
    clock = _clock(settings["warm_up"], settings["warm_up"] + settings["timed"], synchronise=synchronise)
    trainer.callback_handler.callbacks.insert(0, clock)
    return trainer, clock


def _clock(warm_up: int, last: int, *, synchronise: bool) -> Any:
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    class Clock(TrainerCallback):
        """From one `on_step_begin` to the next, so that a step's log is in it, too."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends: list[float] = []
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._tick()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self._tick()
            self.peak_gb = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0

        def _tick(self) -> None:
            if cuda and (synchronise or len(self.ends) in (warm_up, last)):
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        @property
        def steps(self) -> list[float]:
            return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]

    return Clock()


def _overhead(times: Mapping[str, list[float]], variant: str) -> float:
    """The share by which a step is longer than without callbacks."""
    return _digits(statistics.median(a / b for a, b in zip(times[variant], times["none"], strict=True)) - 1)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _update(settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from benchmarks import averages
    from benchmarks.ema_update import compare, make_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
    model = make_model(settings["shape"], dtype, device)
    contenders = {
        "forge": averages.forge,
        "forge, shadow on the CPU": lambda m: averages.forge(m, device="cpu"),
        "torch.swa_utils multi_avg_fn": averages.swa,
    }
    if dtype != torch.float32:
        contenders["torch.swa_utils avg_fn, fp32 shadow"] = averages.swa_fp32
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = compare(contenders, model, repeats=settings["repeats"], wait=wait)
    for name, make in contenders.items():
        found[name]["sees_queued"] = _sees_queued(make, dtype, device)
    return {
        "tensors": len(list(model.parameters())),
        "numbers": sum(p.numel() for p in model.parameters()),
        "averages": found,
    }


def _sees_queued(make: Make, dtype: torch.dtype, device: str) -> bool:
    import torch

    from benchmarks.averages import DECAY
    from benchmarks.ema_update import make_model

    model = make_model("small", dtype, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        average = make(model)
        for _ in range(2):  # some copy at their first update
            average.update()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(10**9)  # about half a second of the queue
        for parameter in model.parameters():
            parameter.fill_(1)
        average.update()
        if device == "cuda":
            torch.cuda.synchronize()
    return all(bool((shadow.float() - (1 - DECAY)).abs().max() < 1e-5) for shadow in average.shadow())
