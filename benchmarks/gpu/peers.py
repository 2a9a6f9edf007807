"""What other estimators say of a cell, asked as their users ask them, without a network.

`accelerate estimate-memory` knows the model alone: the bytes of its weights in a dtype, and four times them for
"training using Adam". Its command reads the model from the hub; here the same functions get the same empty model, built
from the config as `create_empty_model` builds it. Where all weights are trained its answer is the one for training; for
adapters it has none, and its weights in the loaded dtype are what a user can read from its table (`of` says which).

`fitcheck` (fitcheck-llm) is called by its command line, on a hub cache that holds the config and nothing else, which is
its documented way of working offline. It has options for LoRA, NF4, INT8, checkpointing and a fused attention. What it
has no option for is either refused, or left out and named in `ignored`.

fitcheck is no dependency of forge: put it into a folder of its own and name it in $FORGE_BENCH_PEERS (PEERS is the pip
line). Without it its entry says `not_installed`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, installed_version

FOLDER = "FORGE_BENCH_PEERS"
PEERS = "pip install --no-deps --target /tmp/peers fitcheck-llm==0.3.1"
GIB, MIB = 2**30, 2**20

_WIDTH = {"full": "float32", "full-bf16": "float16", "lora": "float16", "dora": "float16", "int8": "int8"}
_FITCHECK_OPTIM = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw", "adamw_8bit": "adam8bit"}
_FITCHECK_OPTIM |= {"paged_adamw_8bit": "adam8bit", "paged_adamw_32bit": "adamw"}
_FITCHECK_GPU = {"RTX 5070 Ti": "5070ti", "RTX 4090": "4090", "A100-40GB": "a100-40", "H100": "h100", "H200": "h200"}


def peers(config: Any, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each peer's estimate for a cell of the memory group, in GiB as `total_gb`; or why there is none.

    Args:
        config: of the model.
        settings: of the cell; `card` names the GPU, an H100 without it.
    """
    return {"accelerate": accelerate(config, settings), "fitcheck": fitcheck(config, settings)}


def accelerate(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`accelerate estimate-memory`: the numbers of its table that speak of this cell."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    with init_empty_weights():
        model = AutoModel.from_config(config, dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    dtype = _WIDTH.get(settings["method"], "int4")
    trains_all = settings["method"].startswith("full")
    found = max(estimate_training_usage(total, dtype).values())
    weights = total / {"float32": 1, "float16": 2, "int8": 4, "int4": 8}[dtype]
    return {
        "version": installed_version("accelerate"),
        "of": "training" if trains_all else "weights",
        "dtype": dtype,
        "total_gb": round((found if trains_all else weights) / GIB, 3),
        "weights_gb": round(weights / GIB, 3),
    }


def fitcheck(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """fitcheck-llm: its estimate of the whole process, and its verdict for the card."""
    folder = os.environ.get(FOLDER)
    path = [*filter(None, [folder]), *filter(None, sys.path)]
    if importlib.util.find_spec("fitcheck") is None and not (folder and Path(folder, "fitcheck").is_dir()):
        return {"not_installed": f"{PEERS}; export {FOLDER}=/tmp/peers"}
    options, ignored = _fitcheck_options(settings)
    if isinstance(options, str):
        return {"refused": options}
    with tempfile.TemporaryDirectory() as cache:
        _hub_cache(Path(cache), config)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": cache, "PYTHONPATH": os.pathsep.join(path)}
        command = [sys.executable, "-m", "fitcheck", "bench/model", *options, "--json"]
        run = subprocess.run(
            command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    if run.returncode not in (0, 1):  # 1: it does not fit, or may not
        return {"refused": " ".join(run.stderr.split())[-600:]}
    answer = json.loads(run.stdout)
    return {
        "version": answer["fitcheck_version"],
        "total_gb": round(answer["memory_mib"]["total"] * MIB / GIB, 3),
        "parts_mib": answer["memory_mib"],
        "fits": answer["verdict"]["status"],
        "gpu": answer["gpu"]["name"],
        "ignored": ignored,
    }


def _fitcheck_options(settings: Mapping[str, Any]) -> tuple[list[str] | str, list[str]]:
    """Its command line, or why it has none for this cell; and what it has no option for."""
    method, dpo = settings["method"], settings["trainer"] == "dpo"
    full, nf4 = method.startswith("full"), method.startswith(("nf4", "fp4"))
    optim = settings.get("optim") or ("paged_adamw_8bit" if nf4 or method == "int8" else "adamw_torch_fused")
    if optim not in _FITCHECK_OPTIM:
        return f"no option for the optimizer {optim}", []
    ignored = [f"{name}={settings[name]}" for name in ("ema", "data", "dropout", "reference") if name in settings]
    options = ["--batch-size", str(settings["rows"] * (2 if dpo else 1)), "--seq-len", str(settings["length"])]
    ignored += ["trainer=dpo: asked for twice the rows"] * dpo + ["trainer=plain"] * (settings["trainer"] == "plain")
    ignored += [f"method={method}: asked without it"] * (method in ("dora", "nf4-dora", "fp4"))
    options += ["--optimizer", _FITCHECK_OPTIM[optim], "--gpu", _FITCHECK_GPU[settings.get("card", "H100")]]
    options += ["--grad-accum", str(settings.get("accumulation", 1))]
    if settings.get("checkpointing") != "off":
        options += ["--grad-checkpoint"]
    if settings.get("attention") != "eager":
        options += ["--flash-attn"]
    options += ["--no-lora"] if full else ["--lora-r", str(settings.get("lora_r", 16)), "--lora-targets", "full"]
    if nf4 or method == "int8":
        options += ["--quant", "nf4" if nf4 else "int8"]
    if nf4 and method != "nf4-single":
        options += ["--double-quant"]
    if method == "full-bf16":
        options += ["--optimizer-dtype", "bf16"] if _FITCHECK_OPTIM[optim] == "adamw" else []
    return options, ignored


def _hub_cache(cache: Path, config: Any) -> None:
    """A hub cache as a download of `config.json` leaves it."""
    commit = "0" * 40
    model = cache / "models--bench--model"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(config.to_json_string(use_diff=False))
