"""One update of an exponential moving average of 50 million weights: forge's EMA beside four others.

`lora`: the 448 matrices of adapters on all linear layers of Llama-3.1-8B, at rank 19, which makes 49.8 million numbers.
`dense`: the 254 tensors of a transformer of 50 million. In fp32 and in bf16. All in one process and in a new random
order each time, so that whatever else the machine does hits all alike; `times_forge` is the median of the ratios within
a round, above 1 where forge is faster. Peers get the trainable tensors alone, in one flat module: their cheapest case,
as most of them copy and walk through the whole model.

`after_3000` is the question of correctness: a shadow begins at random weights, the weights then stand elsewhere, and
after 3,000 updates with a decay of 0.999 the shadow must be where the formula (in fp64) says. `error` is the rms
distance from there over the whole way, `bias` its mean along the way: "right" where the error is below 0.1%,
"imprecise" where only the bias is small (1%; stochastic rounding, or products rounded to bf16), else "stalled".
`python -m benchmarks.ema_update` writes results/ema_update.jsonl.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.runner import Suite, main

if TYPE_CHECKING:
    import torch
    from torch import nn

    from benchmarks.averages import Average, Make

REPEATS, WARM_UP = 25, 3
CELLS = tuple(
    {"shape": shape, "dtype": dtype, "threads": threads, "repeats": REPEATS}
    for threads in (1,)  # more wait for each other where others use the cores too
    for shape in ("lora", "dense")
    for dtype in ("fp32", "bf16")
)
SUITE = Suite("ema_update", "benchmarks.ema_update:measure", CELLS, timeout_s=500)
UPDATES = 3000

LORA_RANK, LORA_LAYERS = 19, 32
# in, out of q, k, v, o, gate, up, down of Llama-3.1-8B
_LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
DENSE_LAYERS, DENSE_WIDTH, DENSE_INNER, DENSE_VOCABULARY = 28, 384, 1024, 2048


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time all averages of one model, in turn."""
    import torch

    from benchmarks.averages import makers, peer_versions

    torch.set_num_threads(settings["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
    model = make_model(settings["shape"], dtype)
    found = compare(dict(makers(dtype)), model, repeats=settings["repeats"])
    right = [entry for name, entry in found.items() if name != "forge" and entry.get("after_3000") == "right"]
    best = min(right, key=lambda entry: entry["times_forge"], default=None)
    return {
        "tensors": len(list(model.parameters())),
        "numbers": sum(p.numel() for p in model.parameters()),
        "best_right_peer_times_forge": best and best["times_forge"],
        "averages": found,
        "peers": peer_versions(),
    }


def make_model(shape: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """The trainable tensors of a model, in one flat module."""
    import torch

    if shape == "lora":
        sizes = [size for n_in, n_out in _LLAMA_8B * LORA_LAYERS for size in ((LORA_RANK, n_in), (n_out, LORA_RANK))]
    elif shape == "dense":
        wide, inner = DENSE_WIDTH, DENSE_INNER
        layer: list[tuple[int, ...]] = [(wide, wide)] * 4 + [(inner, wide)] * 2 + [(wide, inner)] + [(wide,)] * 2
        sizes = [(DENSE_VOCABULARY, wide), *layer * DENSE_LAYERS, (wide,)]
    else:
        sizes = [(64, 64), (7, 33)]
    torch.manual_seed(0)
    model = torch.nn.Module()
    for index, size in enumerate(sizes):
        model.register_parameter(f"p{index}", torch.nn.Parameter(torch.randn(size, device=device).to(dtype)))
    return model


def compare(
    contenders: Mapping[str, Make], model: nn.Module, *, repeats: int, wait: Callable[[], object] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each contender's update, and whether it averages; "forge" must be among them.

    Args:
        contenders: by name, each a function of the model.
        model: whose parameters are averaged.
        repeats: rounds; each runs all in another order.
        wait: called before the clock is read; empties a device's queue.
    """
    import torch

    found: dict[str, dict[str, Any]] = {}
    averages: dict[str, Average] = {}
    for name, make in contenders.items():
        if isinstance(average := _begun(make, model), str):
            found[name] = {"not_installed": average}
        else:
            averages[name] = average
    with torch.no_grad():  # a difference to average
        for parameter in model.parameters():
            parameter.mul_(1.01)
    times: dict[str, list[float]] = {name: [] for name in averages}
    rng = random.Random(0)
    for turn in range(WARM_UP + repeats):
        for name in rng.sample(list(averages), len(averages)):
            wait()
            begin = time.perf_counter()
            averages[name].update()
            wait()
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begin))
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    for name, average in averages.items():
        ratios = [mine / forge for mine, forge in zip(times[name], times["forge"], strict=True)]
        found[name] = {
            "median_ms": round(statistics.median(times[name]), 3),
            "min_ms": round(min(times[name]), 3),
            "times_forge": round(statistics.median(ratios), 3),
            "shadow": str(average.shadow()[0].dtype).removeprefix("torch."),
            **_correctness(contenders[name], dtype, str(device)),
        }
    return found


def _begun(make: Make, model: nn.Module) -> Average | str:
    """The average, or how to install what it needs."""
    from benchmarks.averages import NotInstalledError

    try:
        return make(model)
    except NotInstalledError as error:
        return str(error)


def _correctness(make: Make, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Where the shadow is after many updates, against the formula in fp64."""
    import torch

    from benchmarks.averages import DECAY

    model = make_model("small", dtype, device)
    parameters = list(model.parameters())
    start = [p.detach().double() for p in parameters]
    average = make(model)
    for _ in range(2):  # some copy at their first update; at the start nothing moves
        average.update()
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn_like(parameter))
    way = torch.cat([(p.detach().double() - s).flatten() for p, s in zip(parameters, start, strict=True)])
    for _ in range(UPDATES):
        average.update()
    if device != "cpu":
        torch.cuda.synchronize()
    shadow = average.shadow()
    gone = torch.cat([(now.detach().to(s) - s).flatten() for now, s in zip(shadow, start, strict=True)])
    off = gone - (1 - DECAY**UPDATES) * way
    error, bias = float(off.norm() / way.norm()), float((off @ way) / (way @ way))
    verdict = "right" if error < 1e-3 else "imprecise" if abs(bias) < 1e-2 else "stalled"
    return {"after_3000": verdict, "error": float(f"{error:.2g}"), "bias": float(f"{bias:.2g}")}


if __name__ == "__main__":
    sys.exit(main(SUITE))
