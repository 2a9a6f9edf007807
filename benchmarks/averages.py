"""forge's EMA and its peers behind one interface: what a benchmark of them has to know about each.

The peers are no dependency of forge. Put them into a folder of their own and name it in $FORGE_BENCH_PEERS (PEERS is
the pip line); what is missing is named as such and the others are measured. Every library gets what suits it best: its
foreach path and its loop, and for bf16 weights its fp32 shadow beside its default, where it has one.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.provenance import installed_version

DECAY = 0.999
FOLDER = "FORGE_BENCH_PEERS"
VERSIONS = {"ema-pytorch": "0.8.3", "timm": "1.0.31", "diffusers": "0.42.1"}
PEERS = "pip install --no-deps --target /tmp/peers " + " ".join(f"{name}=={v}" for name, v in VERSIONS.items())


@dataclass(frozen=True)
class Average:
    """An average that has begun at a model's weights.

    Args:
        update: averages once, with a decay of `DECAY`.
        shadow: the averaged tensors, in the order of the model's parameters.
    """

    update: Callable[[], object]
    shadow: Callable[[], list[Tensor]]


Make = Callable[[nn.Module], Average]


class NotInstalledError(Exception):
    """A peer is missing; says how to get it."""


def makers(dtype: torch.dtype) -> Iterator[tuple[str, Make]]:
    """Name and maker of every average that takes weights of this dtype, forge's first."""
    yield "forge", forge
    yield "torch.swa_utils multi_avg_fn", swa
    for loop in (False, True):
        how = "loop" if loop else "foreach"
        yield f"ema-pytorch {how}", lambda m, loop=loop: ema_pytorch(m, loop=loop)
        yield f"timm {how}", lambda m, loop=loop: timm(m, loop=loop)
        yield f"diffusers {how}", lambda m, loop=loop: diffusers(m, loop=loop)
        if dtype != torch.float32:
            yield f"ema-pytorch {how}, fp32 shadow", lambda m, loop=loop: ema_pytorch(m, loop=loop, fp32=True)
            yield f"timm {how}, fp32 shadow", lambda m, loop=loop: timm(m, loop=loop, fp32=True)
            yield f"diffusers {how}, fp32 shadow", lambda m, loop=loop: diffusers(m, loop=loop, fp32=True)
    if dtype != torch.float32:
        yield "torch.swa_utils avg_fn, fp32 shadow", swa_fp32


def forge(model: nn.Module, device: str | None = None) -> Average:
    """`EMA(...).update(decay)`."""
    from forge.callbacks import EMA

    ema = EMA(model.named_parameters(), device=device)
    return Average(lambda: ema.update(DECAY), lambda: list(ema.average.values()))


def swa(model: nn.Module) -> Average:
    """As the docstring of AveragedModel has it; its first update copies."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Average(lambda: average.update_parameters(model), lambda: list(average.module.parameters()))


def swa_fp32(model: nn.Module) -> Average:
    """Its multi_avg_fn takes one dtype only; the function for one tensor promotes."""
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    average = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY))
    average.module.float()
    return Average(lambda: average.update_parameters(model), lambda: list(average.module.parameters()))


def ema_pytorch(model: nn.Module, *, loop: bool = False, fp32: bool = False) -> Average:
    """Its warm-up of the decay is over at once with an `inv_gamma` near 0; its first update copies."""
    module = peer("ema-pytorch", "ema_pytorch")
    own: dict[str, Any] = {"ema_model": copy.deepcopy(model).float(), "coerce_dtype": True} if fp32 else {}
    average = module.EMA(
        model, beta=DECAY, update_every=1, update_after_step=0, inv_gamma=1e-12, use_foreach=not loop, **own
    )
    return Average(average.update, lambda: list(average.ema_model.parameters()))


def timm(model: nn.Module, *, loop: bool = False, fp32: bool = False) -> Average:
    """ModelEmaV3. A bf16 shadow is rounded stochastically, which is its default."""
    module = peer("timm", "timm/utils/model_ema.py")
    own = {"dtype": torch.float32} if fp32 else {}
    average = module.ModelEmaV3(model, decay=DECAY, foreach=not loop, **own)
    return Average(lambda: average.update(model), lambda: list(average.module.parameters()))


def diffusers(model: nn.Module, *, loop: bool = False, fp32: bool = False) -> Average:
    """EMAModel; `min_decay` ends its warm-up at once."""
    module = peer("diffusers", "diffusers.training_utils")
    average = module.EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=not loop)
    if fp32:
        average.to(dtype=torch.float32)
    return Average(lambda: average.step(model.parameters()), lambda: list(average.shadow_params))


def peer(package: str, module: str) -> ModuleType:
    """Import a peer's module, or the one file of it that matters where the package asks for more (timm: torchvision).

    Raises:
        NotInstalledError: It is not there.
    """
    folder = os.environ.get(FOLDER)
    if folder and folder not in sys.path:
        sys.path.append(folder)  # last: nothing in it may take the place of what is installed
    root = module.partition("/")[0].partition(".")[0]
    spec = importlib.util.find_spec(root)
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError(f"{package} is not installed: {PEERS}; export {FOLDER}=/tmp/peers")
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(spec.submodule_search_locations[0]).parent / module
    single = importlib.util.spec_from_file_location(f"benchmarks._{path.stem}", path)
    assert single is not None
    assert single.loader is not None
    found = importlib.util.module_from_spec(single)
    single.loader.exec_module(found)
    return found


def peer_versions() -> dict[str, str]:
    """Of the peers that are there."""
    return {package: found for package in VERSIONS if (found := installed_version(package))}
