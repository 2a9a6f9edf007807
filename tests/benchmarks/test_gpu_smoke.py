"""The GPU matrix on a machine without a GPU: the same code with tiny shapes, the readings with a stand-in for CUDA."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmarks.gpu.matrix import CELLS, SMOKE_CELLS
from benchmarks.gpu.report import render
from benchmarks.runner import key, read_rows

from benchmarks import steps


def gpu(*arguments):
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_smoke_runs_every_kind_of_cell_and_the_report_shows_it(tmp_path):
    results = tmp_path / "rows.jsonl"
    run = gpu("--smoke", "--results", str(results))
    rows = read_rows(results)
    assert {row["key"]: row["status"] for row in rows} == {key(cell): "ok" for cell in SMOKE_CELLS}, run.stderr[-3000:]
    assert run.returncode == 0
    for row in rows:
        if row["settings"]["group"] == "evaluation":
            assert row["result"]["batch_2"]["tokens_per_s"] > 0
            continue
        if row["settings"]["group"] == "packing":
            assert row["result"]["speedup"] > 0
            assert row["result"]["fewer_dispatches"] > 1
            continue
        if row["settings"]["group"] == "adapters":
            # What unload() cannot undo is why forge has a way of its own; this llama has no biases.
            kept = row["settings"]["by"] == "forge" or row["settings"]["kind"] in ("plain", "bias")
            assert row["result"]["same"] == kept, row["key"]
            continue
        if row["settings"]["group"] == "tuning":
            assert row["result"]["steps"] == 2
            assert row["result"]["estimated_gb"] > 0
            continue
        assert len(row["result"]["steps_s"]) == len(row["result"]["losses"]) == 3
        assert row["result"]["tokens_per_s"] > 0
    presets = [row for row in rows if row["settings"]["group"] == "presets"]
    by_preset = {(row["settings"]["preset"], row["settings"]["by"]): row["result"] for row in presets}
    assert by_preset["qlora", "forge"]["trainable_dtypes"] == ["torch.float32"]
    assert by_preset["qlora", "trl"]["trainable_dtypes"] == ["torch.bfloat16"], "TRL no longer casts: the docs say so"
    assert by_preset["sft", "forge"]["trainable_parameters"] == by_preset["sft", "trl"]["trainable_parameters"]
    memory = [row for row in rows if row["settings"]["group"] == "memory"]
    for row in memory:
        settings, result = row["settings"], row["result"]
        rows_of_a_step = settings["rows"] * (2 if settings["trainer"] == "dpo" else 1)
        shape = [1, rows_of_a_step * 64] if settings.get("data") == "packed" else [rows_of_a_step, 64]
        assert result["batches"] == [shape], f"not the batch that {row['key']} speaks of"
        assert (result["stage"], result["steps_done"]) == ("done", 3)
        assert result["estimate"]["allocated_peak_gb"] > 0, result.get("estimate_error")
        assert result["peers"]["accelerate"]["total_gb"] >= 0
        assert result["optimizer"] == settings.get("optim", "adamw_torch_fused")
    assert {row["settings"]["trainer"] for row in memory} == {"sft", "dpo", "plain"}
    table = render(rows)
    assert "| llama-tiny | qlora | 2 x 64 |" in table
    assert "| gpt2-tiny | plain, full, checkpointing off, data padded | 2 x 64 |" in table
    assert "| llama-tiny | answers, batch of 2 |" in table
    assert "| llama-tiny | pissa | forge | 2 | yes |" in table
    assert "| llama-tiny | qlora | 64 |" in table
    assert "torch" in table


def test_every_preset_meets_trl_at_the_same_batch_and_length():
    pairs = {}
    for cell in CELLS:
        same = tuple(sorted((name, value) for name, value in cell.items() if name != "by"))
        pairs.setdefault(same, []).append(cell["by"])
    assert len({key(cell) for cell in CELLS}) == len(CELLS) == 16
    assert all(sorted(by) == ["forge", "trl"] for by in pairs.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    run = gpu()
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("the GPU matrix needs a CUDA device: ")


def row(preset, by, status="ok", **result):
    settings = {"group": "presets", "model": "llama-8b", "preset": preset, "by": by, "micro_batch": 4, "length": 2048}
    full = {"tokens_per_s": 8000.0, "step_s": 1.024, "max_allocated_gb": 20.0, "max_reserved_gb": 22.0}
    full |= {"nvml_process_gb": 22.6, "trainable_parameters": 41_943_040, **result}
    found = {"key": key(settings), "settings": settings, "status": status, "date": "2026-11-22T00:00:00Z"}
    found |= {"machine": {"gpu": "H100", "driver": "580", "cpu": "x"}, "versions": {"torch": "2.11.0", "trl": None}}
    return found | ({"result": full} if status == "ok" else {"error": "CUDA out of memory"})


def test_report_shows_ratios_and_misses():
    rows = [row("lora", "forge"), row("lora", "trl", tokens_per_s=4000.0, max_allocated_gb=40.0)]
    rows += [row("sft", "forge", "oom"), row("sft", "trl", "error"), row("dpo", "forge")]
    lines = {line.split(" | ")[1]: line for line in render(rows).splitlines() if line.startswith("| llama")}
    assert "| 8,000 | 4,000 | 2.00 |" in lines["lora"]
    assert "| 20.00 | 40.00 | 0.50 |" in lines["lora"]
    assert "| out of memory | error |  |" in lines["sft"]
    assert "| 8,000 |  |  |" in lines["dpo"]
    assert "CUDA out of memory" in render(rows)
    assert "trl" not in render(rows).split("##")[0], "what is not installed has no version"


def test_memory_readings_on_cuda(monkeypatch):
    import pynvml

    process = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**30)
    other = SimpleNamespace(pid=-1, usedGpuMemory=5 * 2**30)
    monkeypatch.setattr(steps.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps.torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(steps.torch.cuda, "max_memory_reserved", lambda: 2 * 2**30)
    monkeypatch.setattr(steps.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"GPU-12-34": "handle"}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [other, process])
    found = steps.memory()
    assert (found["max_allocated_gb"], found["max_reserved_gb"], found["nvml_process_gb"]) == (1.0, 2.0, 3.0)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [other])
    assert steps.memory()["nvml_process_gb"] == 5.0, "alone on the device, whatever the driver calls it"
    process.usedGpuMemory = None
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: [other, process])
    assert steps.memory()["nvml_process_gb"] is None
