"""The study of what frozen layers save: its pure parts, and every kind of cell on a tiny model."""

import threading
import time

import pytest
import torch
from benchmarks.gpu.report import render
from benchmarks.layer_costs import LayerCosts, StackClock
from benchmarks.ratios import ratios
from benchmarks.runner import Suite, key, run
from benchmarks.taking_turns import Turns

from benchmarks import freezing, frozen_variants
from support.models import text_model


def test_the_cells_are_different_and_each_has_goals():
    cells = freezing.SUITE.cells
    assert len({key(cell) for cell in cells}) == len(cells)
    assert {cell["measures"] for cell in cells} == {"steps", "epochs"} <= freezing.GOALS.keys()
    assert {cell["model"] for cell in cells} == {"deep", "smollm2"}


@pytest.mark.parametrize(
    ("checkpointing", "frozen", "cached", "share"),
    [
        *((True, 0.5, False, 2 / 3), (True, 0.75, False, 1 / 2), (True, 0.5, True, 1 / 2), (True, 0.75, True, 1 / 4)),
        *((False, 0.5, False, 3 / 4), (False, 0.5, True, 1 / 2), (False, 0.75, True, 1 / 4)),
    ],
)
def test_a_step_costs_what_the_issue_says(checkpointing, frozen, cached, share):
    costs = LayerCosts(1.0, 1.0, 0.0, checkpointing)
    assert costs.step(frozen, cached=cached) / costs.step() == pytest.approx(share)
    assert costs.step(0.0) == costs.step(0.0, cached=True) == (3.0 if checkpointing else 2.0)


def test_a_rest_is_paid_whatever_is_frozen():
    assert LayerCosts(1.0, 2.0, 5.0, checkpointing=False).step(0.75, cached=True) == 5.0 + 0.25 * 3.0


def test_a_goal_that_is_missed_says_so():
    variants = {
        "cached-0.5": {"of_all": 0.66, "loss_difference": 0.0},
        "cached-0.75": {"of_all": 0.5, "loss_difference": 1e-7},
    }
    found = freezing.goals({"measures": "epochs", "model": "deep"}, variants)
    assert [(goal["variant"], goal["what"]) for goal in found if not goal["met"]] == [
        ("cached-0.5", "of_all"),
        ("cached-0.75", "loss_difference"),
    ]


def test_one_ratio_has_no_spread():
    assert ratios([1.0], [4.0]) == {"median": 0.25, "low": 0.25, "high": 0.25}


def test_a_variant_names_its_share():
    names = {*frozen_variants.VARIANTS["lora"], *frozen_variants.VARIANTS["full"], *frozen_variants.EPOCHS}
    assert {frozen_variants.share_of(name) for name in names} == {0.0, 0.5, 0.75}


class FakeTrainer:
    def __init__(self, name, steps, log, error=None):
        self.name, self.steps, self.log, self.error = name, steps, log, error
        self.callback = None

    def add_callback(self, callback):
        self.callback = callback

    def remove_callback(self, callback):
        assert callback is self.callback
        self.callback = None

    def train(self):
        for step in range(self.steps):
            self.callback.on_step_begin()
            self.log.append((self.name, step, threading.get_ident()))
            time.sleep(0.01)
            if self.error is not None and step == 1:
                raise self.error
            self.callback.on_step_end()
        time.sleep(0.02)


def test_a_round_is_one_step_of_each():
    log = []
    trainers = {name: FakeTrainer(name, steps, log) for name, steps in (("a", 3), ("b", 3), ("c", 2))}
    turns = Turns(trainers)
    assert not log, "they wait before their first step"
    rounds = 0
    while turns.round():
        rounds += 1
        new = log[-len({name for name, step, _ in log if step == rounds - 1}) :]
        assert {step for _, step, _ in new} == {rounds - 1}
    assert rounds == 3
    assert {name: len(steps) for name, steps in turns.steps.items()} == {"a": 3, "b": 3, "c": 2}
    assert len({thread for _, _, thread in log}) == 3
    whole, steps = turns.whole["a"], turns.steps["a"]
    assert 0.03 <= sum(step.wall_s for step in steps) < whole.wall_s - 0.015, "the end of the training counts too"
    assert whole.cpu_s < 0.02, "waiting is no work"
    turns.stop()


def test_a_stopped_training_makes_no_further_step():
    log = []
    trainers = {"a": FakeTrainer("a", 9, log), "b": FakeTrainer("b", 1, log)}
    turns = Turns(trainers)
    turns.round()
    turns.stop()
    assert len(log) == 2
    assert trainers["a"].callback is trainers["b"].callback is None


def test_what_a_training_raises_comes_out():
    trainers = {"a": FakeTrainer("a", 5, []), "b": FakeTrainer("b", 5, [], error=ValueError("no"))}
    turns = Turns(trainers)
    turns.round()
    with pytest.raises(ValueError, match="no"):
        turns.round()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_layers_time_is_told_from_the_rest(checkpointing):
    model = text_model(layers=2)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: busy(0.02))  # recomputed, unlike what comes last
    model.lm_head.register_forward_hook(lambda *_: busy(0.1))
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: busy(0.04))
    clock = StackClock(model.model.layers)
    ids = torch.arange(8).view(1, 8)
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
    clock.remove()
    forward, backward = clock.result(skip=1, checkpointing=checkpointing)
    assert 0.02 <= forward < 0.06, "without the head"
    assert 0.03 <= backward < 0.09, "without what is recomputed"


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def row_of(cell, tmp_path):
    suite = Suite("test", "benchmarks.freezing:measure", (cell,), timeout_s=400)
    (row,) = run(suite, tmp_path / "rows.jsonl").values()
    assert row["status"] == "ok", row
    return row["result"]


def test_steps_of_a_tiny_model(tmp_path):
    cell = {"measures": "steps", "model": "tiny", "checkpointing": True, "rows": 2, "lengths": [16, 16]}
    cell |= {"rounds": 2, "threads": 1}
    lora, full = (row_of({**cell, "train": train}, tmp_path)["variants"] for train in ("lora", "full"))
    variants = lora | full
    visited = {name: (found["visited"], found["forwards"]) for name, found in variants.items()}
    assert visited["all"] == visited["layers_to_transform-0.5"] == visited["full-requires_grad-0.5"] == (4, 8)
    assert visited["truncated-0.5"] == visited["full-truncated-0.5"] == visited["full-llama-factory-0.5"] == (2, 6)
    assert visited["cached-0.5"] == visited["full-cached-0.5"] == (2, 4)
    assert (visited["truncated-0.75"], visited["cached-0.75"]) == ((1, 5), (1, 2))
    trained = {name: found["trainable_parameters"] for name, found in variants.items()}
    assert trained["layers_to_transform-0.5"] == trained["truncated-0.5"] == trained["all"] / 2
    assert trained["full-llama-factory-0.5"] == trained["full-truncated-0.5"]
    assert variants["layers_to_transform-0.5"]["saved_below_bytes"] > 0
    for name in ("truncated-0.5", "truncated-0.75", "cached-0.5", "cached-0.75"):
        assert variants[name]["saved_below_bytes"] == 0
    assert variants["cached-0.5"]["misses"] == 2


def test_epochs_of_a_tiny_model(tmp_path):
    cell = {"measures": "epochs", "model": "tiny", "checkpointing": True, "rows": 2, "lengths": [8, 16]}
    found = row_of({**cell, "batches": 2, "threads": 1}, tmp_path)
    assert found["steps"] == 6
    for name in ("cached-0.5", "cached-0.75"):
        assert found["variants"][name]["loss_difference"] < 1e-5
        assert found["variants"][name]["misses"] == 4


def test_the_gpu_report_has_a_line_for_each_variant():
    step = {"step_s": 0.5, "of_all": {"median": 0.512}, "expected": 0.5, "tokens_per_s": 8192.0}
    step |= {"max_allocated_gb": 20.0, "max_reserved_gb": None, "nvml_process_gb": 22.0}
    settings = {"group": "freezing", "model": "llama-8b", "micro_batch": 2, "length": 2048}
    rows = [
        {
            "settings": settings,
            "key": key(settings),
            "status": "ok",
            "date": "2026-11-22T00:00:00Z",
            "machine": {"gpu": "H100", "driver": "580", "cpu": "x"},
            "versions": {"torch": "2.11.0"},
            "result": {"variants": {"truncated-0.5": step, "cached-0.5": step | {"read": 0.0123}}},
        }
    ]
    table = render(rows)
    assert "| llama-8b | 2 x 2048 | truncated-0.5 | 0.5 | 0.512 | 0.500 | 8,192 | 20.00 | n/a | 22.00 |  |" in table
    assert "| 1.23% |" in table
