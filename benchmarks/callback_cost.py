"""What EMACallback and MonitorCallback cost per optimizer step, as a share of a real LoRA step on the CPU.

SmolLM2-135M with the LoRA preset through SFTTrainer, on real conversations: 4 rows of 128 tokens a step, no
accumulation, an entry of the log every 10 steps. Every method through which the trainer reaches a callback is timed
inside the run and summed per step. On the CPU nothing is queued and a method's work is done when it returns, so this is
exact, and not the difference of two noisy step times. What it cannot see: a callback's tensors push the model's out of
the caches. A step is everything from one `on_step_begin` to the next: its log, and the data of the next one.

`share` is of all steps from the 5th on (at the first four the monitor looks closer); `plain` and `logging` are medians
over the steps without and with an entry of the log. The goal is a share of 0.01 at most. `begin_ms` and `end_ms` are
the callbacks' work before the first step and after the last (the report and its plots). The monitor's thread, which
asks the machine once a second, is in no step's figure: `sampler_share` is its CPU time over the time of the run.
`python -m benchmarks.callback_cost` writes results/callback_cost.jsonl.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.runner import Suite, main

STEPS, ROWS, MAX_LENGTH, LOGGING_STEPS, CLOSER_LOOKS = 24, 4, 128, 10, 4
VARIANTS = ("both", "monitor", "ema", "ema-every-10")
CELLS = tuple(
    {
        "callbacks": name,
        "rows": ROWS,
        "max_length": MAX_LENGTH,
        "steps": STEPS,
        "logging_steps": LOGGING_STEPS,
        "threads": 1,  # two wait for each other on a busy machine, and the model more than the callbacks
    }
    for name in VARIANTS
)
SUITE = Suite("callback_cost", "benchmarks.callback_cost:measure", CELLS, timeout_s=900)
EVENTS = (
    *("on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step"),
    *("on_optimizer_step", "on_step_end", "on_log", "on_epoch_end", "on_train_end"),
    *("on_micro_batch", "on_norm"),  # what MonitorCallback.attach makes heard
)


class Stopwatch(TrainerCallback):
    """Sums the time spent in other callbacks, by method and by step; goes in front of them all.

    Args:
        callbacks: name to callback; their events are wrapped, on these objects only.
    """

    def __init__(self, callbacks: Mapping[str, TrainerCallback]) -> None:
        self.begins: list[float] = []
        self.spent: list[dict[str, float]] = [defaultdict(float)]
        """Seconds by method: before the first step, in each step, after the last."""
        for name, callback in callbacks.items():
            for event in EVENTS:
                if event in vars(type(callback)):
                    setattr(callback, event, self._timed(getattr(callback, event), f"{name}.{event}"))

    def _timed(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent[-1][name] += time.perf_counter() - begin

        return timed

    def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """A step begins where the one before ends."""
        self._tick()
        inner = optimizer.optimizer
        if not self.begins[1:] and "train" in vars(inner):  # EMACallback listens there, before every micro-batch
            inner.train = self._timed(inner.train, "ema.optimizer.train")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last one ends."""
        self._tick()

    def _tick(self) -> None:
        self.begins.append(time.perf_counter())
        self.spent.append(defaultdict(float))


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train; return the shares, and what makes them up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    from forge import get_preset
    from forge.assets import smollm2
    from forge.callbacks import EMACallback, MonitorCallback

    torch.set_num_threads(settings["threads"])
    folder, chosen = smollm2(), settings["callbacks"]
    with tempfile.TemporaryDirectory() as output:
        callbacks: dict[str, Any] = {}
        if chosen != "monitor":
            callbacks["ema"] = EMACallback(update_every=10 if chosen == "ema-every-10" else 1)
        if chosen in ("monitor", "both"):
            callbacks["monitor"] = MonitorCallback(report_dir=Path(output, "report"), display=False)
        preset = get_preset(
            "lora",
            model=folder,
            hardware="cpu",
            max_length=settings["max_length"],
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["rows"],
            gradient_accumulation_steps=1,
            logging_steps=settings["logging_steps"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            output_dir=output,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs()),
            args=preset.get_sft_config(),
            train_dataset=_long_conversations(settings["rows"] * settings["steps"]),
            peft_config=preset.get_lora_config(),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[*preset.get_callbacks(), *callbacks.values()],
        )
        if "monitor" in callbacks:
            callbacks["monitor"].attach(trainer)
        clock, sampler = Stopwatch(callbacks), _time_the_sampler()
        trainer.callback_handler.callbacks.insert(0, clock)
        trainer.train()
    whole = clock.begins[-1] - clock.begins[0]
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    return {
        **_shares(clock, settings["logging_steps"]),
        "sampler_share": _rounded(sum(sampler) / whole),
        "samples": len(sampler),
        "trainable_tensors": len(trainable),
        "trainable_parameters": sum(p.numel() for p in trainable),
        "checkpointing": bool(trainer.args.gradient_checkpointing),
    }


def _shares(clock: Stopwatch, logging_steps: int) -> dict[str, Any]:
    before, *steps, after = clock.spent
    times = [end - begin for begin, end in zip(clock.begins, clock.begins[1:], strict=False)]
    counted = range(CLOSER_LOOKS, len(times))
    logging = [step for step in counted if (step + 1) % logging_steps == 0]
    plain = [step for step in counted if step not in logging]
    in_callbacks = [sum(spent.values()) for spent in steps]
    names = sorted({name for spent in steps for name in spent})

    def share(chosen: Iterable[int]) -> float:
        return _rounded(statistics.median(in_callbacks[step] / times[step] for step in chosen))

    def by_event(chosen: Iterable[int]) -> dict[str, float]:
        found = {name: 1000 * statistics.median(steps[step][name] for step in chosen) for name in names}
        return {name: _rounded(value) for name, value in sorted(found.items(), key=lambda item: -item[1])}

    return {
        "step_s": round(statistics.median(times[step] for step in counted), 4),
        "share": _rounded(sum(in_callbacks[step] for step in counted) / sum(times[step] for step in counted)),
        "plain": share(plain),
        "logging": share(logging),
        "closer_looks": share(range(CLOSER_LOOKS)),
        "plain_ms_by_event": by_event(plain),
        "logging_ms_by_event": by_event(logging),
        "begin_ms": _rounded(1000 * sum(before.values())),
        "end_ms": _rounded(1000 * sum(after.values())),
        "steps_s": [round(step, 3) for step in times],
    }


def _time_the_sampler() -> list[float]:
    """CPU seconds of each sample that the monitor's thread takes; this process does nothing else."""
    from forge.callbacks.monitor.system import SystemSampler

    seconds: list[float] = []
    inner = SystemSampler._sample

    def sample(self: SystemSampler) -> None:
        begin = time.thread_time()
        inner(self)
        seconds.append(time.thread_time() - begin)

    SystemSampler._sample = sample  # type: ignore[method-assign]
    return seconds


def _long_conversations(rows: int) -> Any:
    from datasets import Dataset

    from forge.assets import conversations

    longest = sorted(conversations(), key=lambda talk: -sum(len(message["content"]) for message in talk))
    return Dataset.from_dict({"messages": longest[:rows]})


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    sys.exit(main(SUITE))
