"""K adapters in one pass against K adapters one after another, on one frozen base.

- `packed`: forge's pack, K slots of one row each: forward, backward, clipping and AdamW of all of them.
- `peft`: a PEFT model of one adapter, as a person trains it: forward with its loss, backward, `clip_grad_norm_`,
  `torch.optim.AdamW(fused=True)`; K of them one after another take K times as long.

Both in one process, a round being a step of each in random order, so that a disturbance hits both. `speedup` is the
median over the rounds of K x peft / packed, `transient_gb` what a step takes on a GPU beside what lies there,
`dispatches` how many operators of ATen a step of either calls (K steps of
peft's), counted by a dispatch mode. The rank is 16 on all linear layers; rows are `tokens` long, all of them learnt.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.runner import Suite, main

RANK, ROUNDS = 16, 12


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One K and one number of tokens on SmolLM2."""
    import torch
    from transformers import AutoModelForCausalLM

    from forge.assets import smollm2

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    return compare(model, slots=settings["slots"], tokens=settings["tokens"], rounds=ROUNDS)


def compare(model: Any, *, slots: int, tokens: int, rounds: int, autocast: bool = False) -> dict[str, Any]:
    """Steps of a pack and of one adapter by PEFT, in turns.

    Args:
        model: the base; a copy of it carries the other kind of adapter.
        slots: K.
        tokens: of each adapter's row.
        rounds: how often.
        autocast: whether products are in bf16.
    """
    import torch

    other = copy.deepcopy(model)
    for base in (model, other):
        base.requires_grad_(False).train()
        base.config.use_cache = False
    ids = torch.randint(5, 1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = {
        "packed": _packed_step(model, ids, slots, autocast=autocast),
        "peft": _peft_step(other, ids, autocast=autocast),
    }
    dispatches = {name: _count(step) for name, step in steps.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    transient_gb: dict[str, float | None] = dict.fromkeys(steps)
    drawn = random.Random(0)
    for _ in range(rounds):
        for name in drawn.sample(list(steps), len(steps)):
            _wait()
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            steps[name]()
            _wait()
            found[name].append(time.perf_counter() - begin)
            if torch.cuda.is_available():
                transient_gb[name] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
    ratios = [slots * alone / packed for alone, packed in zip(found["peft"], found["packed"], strict=True)]
    result = {
        "speedup": round(statistics.median(ratios), 3),
        "speedup_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "packed_s": round(statistics.median(found["packed"]), 4),
        "peft_s": round(statistics.median(found["peft"]), 4),
        "dispatches": {"packed": dispatches["packed"], "peft": slots * dispatches["peft"]},
        "fewer_dispatches": round(slots * dispatches["peft"] / dispatches["packed"], 2),
        "transient_gb": transient_gb,
    }
    print(result, flush=True)
    return result


def _packed_step(model: Any, ids: list[int], slots: int, *, autocast: bool) -> Callable[[], None]:
    import torch

    from forge import get_preset
    from forge.tuning.engines import Task
    from forge.tuning.engines.ground import Row
    from forge.tuning.engines.packed.pack import Pack
    from forge.tuning.engines.packed.skeleton import Skeleton
    from forge.tuning.engines.packed.slots import Hyper

    skeleton = Skeleton(model)
    pack = Pack(model, autocast=torch.bfloat16 if autocast else None)
    preset = get_preset("lora", hardware="cpu", model=model.config, lora_r=RANK)
    adapter = skeleton.create(Task(0, preset))
    for _ in range(slots):
        pack.append(adapter, Hyper(learning_rate=1e-4, warmup=0, total=100))
    rows = [[Row(ids, ids)]] * slots

    def step() -> None:
        pack.backward(range(slots), rows, [len(ids) - 1] * slots)
        pack.step(range(slots))

    return step


def _peft_step(model: Any, ids: list[int], *, autocast: bool) -> Callable[[], None]:
    import torch
    from peft import get_peft_model

    from forge import get_preset

    config = get_preset("lora", hardware="cpu", model=model.config, lora_r=RANK).get_lora_config()
    wrapped = get_peft_model(model, config)
    device = next(model.parameters()).device
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    row = torch.tensor([ids], device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = wrapped(input_ids=row, labels=row).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _count(step: Callable[[], None]) -> int:
    """How many operators of ATen a step calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counter.calls += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        step()
    return Counter.calls


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


SUITE = Suite(
    "packing",
    "benchmarks.packing:measure",
    tuple({"slots": slots, "tokens": tokens} for tokens in (16, 32, 64, 128, 256) for slots in (2, 4, 8)),
    timeout_s=900,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
