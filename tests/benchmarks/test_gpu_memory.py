"""The memory group without a GPU: its cells, what a row knows when training dies, the peers' calls, the report."""

import hashlib
import json
from itertools import pairwise

import pytest
import torch
from benchmarks.gpu import memory, memory_cells, memory_report, peers
from benchmarks.gpu.memory_training import preset_of, said_beside_the_preset
from benchmarks.gpu.report import render
from benchmarks.gpu.shapes import SHAPES, shape_config
from benchmarks.runner import Suite, key, run

import forge
from forge.memory.cards import find_card

MEMORY_CELLS = tuple(memory_cells.cells())
HELD_OUT, DIGEST = 27, "538791830bcc9371"


def test_the_hold_out_is_the_one_that_was_fixed_before_any_measurement():
    held = sorted(key(cell) for cell in MEMORY_CELLS if cell["held_out"])
    assert len({key(cell) for cell in MEMORY_CELLS}) == len(MEMORY_CELLS) == 87
    assert len(held) == HELD_OUT
    digest = hashlib.sha256("\n".join(held).encode()).hexdigest()
    assert digest[:16] == DIGEST, "cells changed: nothing may be fitted to what was held out before"


def test_nobody_picks_what_is_held_out():
    cell = memory_cells.cell("llama-1b", "lora", 4, 1024, ema="cpu")
    assert cell["held_out"] == memory_cells.held_out(cell) == memory_cells.held_out(dict(reversed(cell.items())))
    many = [memory_cells.cell("llama-1b", "lora", rows, 128) for rows in range(1, 601)]
    assert 160 < sum(cell["held_out"] for cell in many) < 240


def test_the_cells_cover_what_they_promise():
    values = {name: {cell.get(name) for cell in MEMORY_CELLS} for name in set().union(*MEMORY_CELLS)}
    assert values["method"] == set(memory_cells.METHODS)
    assert values["trainer"] == {"sft", "dpo", "plain"}
    assert values["checkpointing"] == {None, "off", "reentrant"}
    assert values["attention"] == {None, "eager", "flash_attention_2"}
    assert values["reference"] == {None, "copy", "adapter_off", "precomputed"}
    assert values["ema"] == {None, "device", "cpu"}
    assert values["data"] == {None, "padded", "packed"}
    assert values["model"] <= SHAPES.keys()
    assert {"qwen3-moe-2b", "gemma3-1b", "gpt2-medium", "phi3-mini", "llama-8b"} <= values["model"]
    models = [cell["model"] for cell in MEMORY_CELLS]
    changes = sum(a != b for a, b in pairwise(models))
    assert changes == len(set(models)) - 1, "the cells of a model are not next to each other"


@pytest.mark.parametrize("method", memory_cells.METHODS)
def test_a_cell_becomes_the_preset_it_names(method):
    cell = memory_cells.cell("llama-tiny", method, 2, 64, checkpointing="reentrant", optim="adafactor")
    preset = preset_of(cell, shape_config("llama-tiny"), "out", hardware="hopper")
    values = {name: choice.value for name, choice in preset.choices.items()}
    assert (values["max_length"], values["per_device_train_batch_size"], values["optim"]) == (64, 2, "adafactor")
    assert values["activation_checkpointing_kwargs"] == {"use_reentrant": True}
    assert (preset.get_lora_config() is None) == method.startswith("full")
    assert (preset.get_bnb_config() is not None) == (method in ("nf4", "nf4-single", "nf4-dora", "fp4", "int8"))
    if method.endswith("dora"):
        assert preset.get_lora_config().use_dora
    if method in ("nf4", "nf4-single"):
        assert preset.get_bnb_config().bnb_4bit_use_double_quant == (method == "nf4")
    if method.startswith("full"):
        assert values["dtype"] == {"full": "float32", "full-bf16": "bfloat16"}[method]


def test_dpo_says_where_its_reference_is():
    for reference in ("copy", "precomputed"):
        cell = memory_cells.cell("llama-tiny", "full", 2, 64, trainer="dpo", reference=reference)
        preset = preset_of(cell, shape_config("llama-tiny"), "out", hardware="hopper")
        assert preset.name == "dpo"
        assert preset.choices["precompute_ref_log_probs"].value == (reference == "precomputed")
        assert said_beside_the_preset(cell) == {"trainer": "dpo", "reference": reference}


class Estimate(dict):
    """A stand-in that answers as estimate_model_memory's result does."""

    def fits(self, card):
        return "yes" if find_card(card).usable_bytes > self["high_gb"] * 2**30 else "no"


def said(total=20.0):
    parts = {"allocated_peak_gb": total - 1, "reserved_peak_gb": total - 0.5, "total_estimated_gb": total}
    return Estimate(parts, low_gb=total - 1, high_gb=total + 1, engine="trace", assumptions=("one",))


@pytest.fixture
def smallest(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(forge, "estimate_model_memory", lambda *_, **__: said())
    return memory_cells.cell("llama-tiny", "lora", 2, 64)


def test_out_of_memory_keeps_what_was_estimated(smallest, monkeypatch, tmp_path):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("benchmarks.gpu.memory_training.load", no_room)
    suite = Suite("test", "benchmarks.gpu.memory:measure", (smallest,), timeout_s=None)
    (row,) = run(suite, tmp_path / "rows.jsonl").values()
    assert row["status"] == "oom"
    assert row["partial"]["stage"] == "load"
    assert row["partial"]["estimate"]["total_estimated_gb"] == 20.0
    assert row["partial"]["peers"]["accelerate"]["total_gb"] >= 0


def test_an_estimate_that_fails_is_a_result_and_the_run_goes_on(smallest, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(forge, "estimate_model_memory", broken)
    preset = preset_of(smallest, shape_config("llama-tiny"), "out", hardware="hopper")
    found = memory.estimates(smallest, preset, shape_config("llama-tiny"), shape_config("llama-tiny"))
    assert found["estimate_error"] == "RuntimeError: no such kernel"
    assert "accelerate" in found["peers"]


def test_the_verdicts_of_all_cards_are_kept(smallest):
    preset = preset_of(smallest, shape_config("llama-tiny"), "out", hardware="hopper")
    found = memory.estimates(smallest, preset, shape_config("llama-tiny"), shape_config("llama-tiny"))
    assert found["fits"] == {"RTX 5070 Ti": "no", "RTX 4090": "yes", "A100-40GB": "yes", "L40S": "yes", "H100": "yes"}
    json.dumps(found)


def test_flash_attention_that_is_missing_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    cell = memory_cells.cell("llama-tiny", "lora", 2, 64, attention="flash_attention_2")
    assert memory.measure(cell) == {"not_installed": "flash_attn"}


def test_a_card_leaves_the_allocator_what_the_context_does_not_take(monkeypatch):
    shares = []
    properties = type("", (), {"total_memory": 80 * 2**30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    cell = memory_cells.cell("llama-tiny", "lora", 2, 64, card="RTX 4090")
    found = memory._cap(cell, {"after_init": 0.4, "after_matmul": 0.5})
    assert found == {"card_usable_gb": 23.52, "allocator_cap_gb": 23.02}
    assert shares == pytest.approx([23.02 / 80])
    assert memory._cap(memory_cells.cell("llama-tiny", "lora", 2, 64), {}) == {}


@pytest.mark.parametrize(("own", "source", "expected"), [(7.0, "process", 7.0), (None, "device", 5.5)])
def test_a_process_that_nvml_hides_is_what_the_device_gained(monkeypatch, own, source, expected):
    used = iter([2.5, 8.0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5 * 2**30)
    monkeypatch.setattr(memory.Driver, "_device_gb", staticmethod(lambda: next(used)))
    monkeypatch.setattr("benchmarks.steps.nvml_process_gb", lambda: own)
    driver = memory.Driver()
    assert driver.source == source
    assert driver.outside_gb() == expected - 5


def test_accelerate_says_four_times_the_weights_and_nothing_of_adapters():
    config = shape_config("llama-tiny")
    backbone = 1024 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64  # without the head: AutoModel
    full = peers.accelerate(config, memory_cells.cell("llama-tiny", "full", 2, 64))
    assert (full["of"], full["total_gb"]) == ("training", round(16 * backbone / 2**30, 3))
    packed = peers.accelerate(config, memory_cells.cell("llama-tiny", "nf4", 2, 64))
    assert (packed["of"], packed["dtype"]) == ("weights", "int4")


def test_fitcheck_is_asked_by_its_own_command_line():
    nf4, ignored = peers._fitcheck_options(memory_cells.cell("llama-8b", "nf4", 4, 2048, data="padded"))
    assert " ".join(nf4) == (
        "--batch-size 4 --seq-len 2048 --optimizer adam8bit --gpu h100 --grad-accum 1 --grad-checkpoint --flash-attn "
        "--lora-r 16 --lora-targets full --quant nf4 --double-quant"
    )
    assert ignored == ["data=padded"]
    full, _ = peers._fitcheck_options(
        memory_cells.cell("llama-1b", "full", 1, 9, checkpointing="off", attention="eager", card="RTX 4090")
    )
    assert full[4:] == ["--optimizer", "adamw", "--gpu", "4090", "--grad-accum", "1", "--no-lora"]
    dpo, ignored = peers._fitcheck_options(memory_cells.cell("llama-1b", "lora", 2, 9, trainer="dpo"))
    assert dpo[:2] == ["--batch-size", "4"]
    assert ignored == ["trainer=dpo: asked for twice the rows"]
    refused, _ = peers._fitcheck_options(memory_cells.cell("llama-1b", "full", 1, 9, optim="adafactor"))
    assert refused == "no option for the optimizer adafactor"


def test_a_peer_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv(peers.FOLDER, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found = peers.fitcheck(shape_config("llama-tiny"), memory_cells.cell("llama-tiny", "lora", 2, 64))
    assert found["not_installed"].startswith("pip install --no-deps --target /tmp/peers fitcheck-llm==")


def row(cell, status="ok", *, allocated=18.0, reserved=20.0, process=21.0, **more):
    found = {"estimate": dict(said()), "fits": {"RTX 4090": "yes"}, "estimate_s": 1.5, **more}
    found["peers"] = {"accelerate": {"of": "weights", "total_gb": 9.0}, "fitcheck": {"refused": "no experts"}}
    measured = {"max_allocated_gb": allocated, "max_reserved_gb": reserved, "nvml_process_gb": process, "step_s": 0.25}
    measured["context_gb"] = {"after_init": 0.4, "after_matmul": 0.5, "at_end": 1.0}
    made = {"key": key(cell), "settings": cell, "status": status, "date": "2026-11-22T00:00:00Z"}
    made |= {"machine": {"gpu": "H100", "gpu_memory_gb": 79.6, "cpu": "x"}, "versions": {"torch": "2.11.0"}}
    return made | ({"result": found | measured} if status == "ok" else {"error": "no room", "partial": found})


def a_cell(held_out, **deviations):
    """One of that half; its length does not matter."""
    made = (memory_cells.cell("llama-1b", "lora", 4, n, **deviations) for n in range(8, 99))
    return next(cell for cell in made if cell["held_out"] == held_out)


def test_report_gives_signed_errors_of_both_halves():
    rows = [row(a_cell(False)), row(a_cell(False, ema="cpu"), process=16.0), row(a_cell(True))]
    lines = render(rows).splitlines()
    assert "## Memory: estimates against 3 measured runs, and 0 that ran out of memory" in lines
    assert "| process | to fit | 2 | 14.9% | +10.1% | -4.8% | +25.0% | 1 of 2 |" in lines
    assert "| process | held out | 1 | 4.8% | -4.8% | -4.8% | -4.8% | 1 of 1 |" in lines
    assert "| allocated | held out | 1 | 5.6% | +5.6% | +5.6% | +5.6% |  |" in lines
    assert "| accelerate | weights (no more is offered) | 3 | 50.0% | -50.0% | -50.0% | -50.0% | 5.6% |" in lines
    assert "- 3 x fitcheck refused: no experts" in lines
    assert "| at end | 2 | 1.000 | 1.000 | 1.000 |" in lines, "a held-out cell is no evidence for a constant"
    (cell,) = [line for line in lines if "ema cpu" in line]
    assert "| 16.00 | +25.0% |" in cell
    assert "## Presets" not in render(rows)


@pytest.mark.parametrize(
    ("cell", "verdict", "expected"),
    [
        (row(a_cell(False, card="RTX 4090")), "yes", "| forge | tried | 1 | 0 | 0 | 0 | 0 |"),
        (row(a_cell(False, card="RTX 4090"), "oom"), "yes", "| forge | tried | 0 | 0 | 1 | 0 | 0 |"),
        (row(a_cell(False, card="RTX 4090"), "oom"), "uncertain", "| forge | tried | 0 | 1 | 0 | 0 | 0 |"),
        (row(a_cell(False)), "no", "| forge | from the measured size | 0 | 0 | 0 | 1 | 0 |"),
        (
            row(a_cell(False), process=40.0, allocated=38.0),
            "no",
            "| forge | from the measured size | 1 | 0 | 0 | 0 | 0 |",
        ),
        (row(a_cell(False), process=24.0), "no", "| forge | from the measured size | 0 | 0 | 0 | 0 | 1 |"),
        (row(a_cell(False), "oom"), "no", "| forge | from the measured size | 1 | 0 | 0 | 0 | 0 |"),
    ],
)
def test_report_judges_verdicts_only_where_the_truth_is_known(cell, verdict, expected):
    (cell["result"] if cell["status"] == "ok" else cell["partial"])["fits"] = {"RTX 4090": verdict}
    assert expected in render([cell])


def test_report_shows_an_estimate_where_there_is_nothing_to_compare_it_with():
    text = render([row(a_cell(True), "oom"), row(a_cell(False), "error")])
    (died,) = [line for line in text.splitlines() if "| yes |" in line]
    assert "| out of memory | (20.0) |" in died
    assert "and 1 that ran out of memory" in text
    flash = row(a_cell(False))
    flash["result"] = {"not_installed": "flash_attn"}
    assert "| no flash_attn |" in render([flash])


def test_report_without_rows_says_so():
    assert memory_report.parts([])[0].startswith("## Memory\n\nNo rows yet: run")
    assert memory_report.chart([row(a_cell(False), "oom")]) is None


def test_chart_puts_estimates_over_what_was_measured():
    rows = [row(a_cell(False), process=30.0), row(a_cell(True), process=10.0)]
    chart = memory_report.chart(rows)
    lines = {series.name: (series.x, series.y) for series in chart.series}
    assert lines["measured"] == ((10.0, 30.0), (10.0, 30.0))
    assert lines["forge"] == ((10.0, 30.0), (20.0, 20.0))
    assert lines["accelerate"] == ((10.0, 30.0), (9.0, 9.0))
    assert "fitcheck" not in lines
    assert chart.png().startswith(b"\x89PNG")
