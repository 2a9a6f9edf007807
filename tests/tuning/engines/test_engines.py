"""One contract for all engines: the same arrivals, the same adapters, and a base that comes back."""

import json

import pytest
import torch

from forge import get_preset, prepare_dataset
from forge.errors import ConflictError, UnsupportedError
from forge.tuning.engines import Arrival, Task
from forge.tuning.engines.choose import PackChoice, choose_pack
from forge.tuning.engines.ground import Ground, rows_of
from forge.tuning.engines.packed.engine import PackedEngine
from forge.tuning.engines.shared import SharedEngine
from support.models import text_model
from support.tokenizer import tiny_tokenizer

TRIALS = (
    {"lora_r": 4, "learning_rate": 1e-2, "freeze_ratio": 0.25},
    {"lora_r": 16, "learning_rate": 3e-3, "effective_batch_size": 8, "freeze_ratio": 0.25},
    {"lora_r": 8, "learning_rate": 1e-3, "freeze_ratio": 0.5},
    {"lora_r": 2, "learning_rate": 2e-2, "num_train_epochs": 1, "freeze_ratio": 0.25},
)


@pytest.fixture(scope="module")
def data():
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {number}?"},
                {"role": "assistant", "content": f"It is {number + 1}." + " yes" * (number % 7)},
            ]
        }
        for number in range(40)
    ]
    return prepare_dataset(chats, tiny_tokenizer(), validation=8, max_length=64)


def ground_of(data, model=None, **changes) -> Ground:
    model = text_model("llama") if model is None else model
    return Ground(model, tiny_tokenizer(), rows_of(data.train), rows_of(data.validation), 4, **changes)


def task(ground, number, **params) -> Task:
    freeze = params.pop("freeze_ratio", 0.0)
    said = {"effective_batch_size": 4, "num_train_epochs": 2, "max_length": 64, **params}
    config = ground.model.config
    preset = get_preset("lora", hardware="cpu", model=config, per_device_train_batch_size=4, **said)
    return Task(number, preset, freeze_ratio=freeze)


def engine_of(kind, ground, folder, capacity=4):
    if kind == "packed":
        return PackedEngine(ground, task(ground, 0).preset.get_sft_config(), capacity=capacity)
    reload = (lambda: text_model("llama")) if kind == "reload" else None
    return SharedEngine(ground, folder / "turns", capacity=capacity, reload=reload)


def figures(arrivals) -> list:
    return [(one.number, one.percent, one.status, one.steps, one.total_steps, one.tokens) for one in arrivals]


def run(engine, folder, *, stop=()) -> list[Arrival]:
    """Everything to its end; trials in `stop` are dropped at the rung that is said there."""
    found = []
    while engine.numbers:
        arrivals = engine.advance()
        assert arrivals
        found += arrivals
        for one in arrivals:
            if one.percent >= 100:
                engine.export(one.number, folder / f"adapter-{one.number}")
            if one.percent >= 100 or one.status != "reached" or (one.number, one.percent) in stop:
                engine.drop(one.number)
    return found


def adapters_in(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("adapter-*/adapter_model.safetensors"))
    return {f"{file.parent.name} {name}": value for file in files for name, value in load_file(file).items()}


def test_all_engines_come_to_the_same(data, tmp_path):
    outcomes = {}
    for kind in ("packed", "shared", "reload"):
        ground, folder = ground_of(data), tmp_path / kind
        before = {name: value.clone() for name, value in ground.model.state_dict().items()}
        engine = engine_of(kind, ground, folder, capacity=3)
        for number in range(3):
            engine.add(task(ground, number, **TRIALS[number]))
        assert engine.free == 0
        arrivals = list(engine.advance())
        assert [one.percent for one in arrivals] == [25.0] * 3
        engine.drop(1)
        engine.add(task(ground, 3, **TRIALS[3]))
        arrivals += run(engine, folder, stop={(0, 50.0)})
        engine.close()
        outcomes[kind] = (arrivals, adapters_in(folder))
        assert all(torch.equal(before[name], value) for name, value in ground.model.state_dict().items())
        assert all(parameter.requires_grad for parameter in ground.model.parameters())
        assert not any("Packed" in type(module).__name__ for module in ground.model.modules())
    first, adapters = outcomes["packed"]
    assert {one.number for one in first if one.percent == 100} == {2, 3}
    for kind in ("shared", "reload"):
        others, their_adapters = outcomes[kind]
        assert figures(others) == figures(first)
        for one, other in zip(first, others, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert [loss for _, loss in one.curve] == pytest.approx([loss for _, loss in other.curve], rel=1e-3)
        assert their_adapters.keys() == adapters.keys()
        for name, value in adapters.items():
            assert float((value - their_adapters[name]).abs().max()) < 1e-4


def test_the_prefix_cache_changes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    found, hits = [], 0
    for cache in (False, True):
        ground = ground_of(data, prefix_cache=cache)
        engine = engine_of("packed", ground, tmp_path)
        for number in range(3):
            engine.add(task(ground, number, **TRIALS[number]))
        arrivals = []
        while engine.numbers:
            arrivals += (last := engine.advance())
            hits = max(hits, engine._prefix._cache.hits if cache else 0)
            for one in last:
                if one.percent >= 100:
                    engine.drop(one.number)
        engine.close()
        found.append(arrivals)
    assert hits > len(data.train)
    assert [one.loss for one in found[0]] == pytest.approx([one.loss for one in found[1]], rel=1e-6)


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_what_is_killed_after_any_arrival_goes_on_to_the_same(kind, data, tmp_path):
    trials = [{**trial, "lora_dropout": 0.1} for trial in TRIALS[:2]]

    def begin(folder):
        ground = ground_of(data)
        engine = engine_of(kind, ground, folder, capacity=2)
        tasks = {number: task(ground, number, **params) for number, params in enumerate(trials)}
        return engine, tasks

    engine, tasks = begin(tmp_path / "whole")
    torch.manual_seed(0)
    for one in tasks.values():
        engine.add(one)
    whole = run(engine, tmp_path / "whole")
    engine.close()

    folder = tmp_path / "killed"
    engine, tasks = begin(folder)
    torch.manual_seed(0)
    for one in tasks.values():
        engine.add(one)
    seen = []
    while engine.numbers:
        arrivals = engine.advance()
        engine.save(folder / "state")
        engine.close()
        engine, tasks = begin(folder)  # a new process
        torch.manual_seed(99)
        again = engine.load(folder / "state", tasks)
        assert [one.to_dict() for one in again] == [one.to_dict() for one in arrivals]
        seen += again
        for one in again:
            if one.percent >= 100:
                engine.export(one.number, folder / f"adapter-{one.number}")
                engine.drop(one.number)
                del tasks[one.number]
    engine.close()
    assert figures(seen) == figures(whole)
    assert [one.loss for one in seen] == [one.loss for one in whole]
    expected = adapters_in(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in adapters_in(folder).items())
    assert len(expected) == len(adapters_in(folder)) > 0


def test_a_trial_that_ended_meanwhile_is_left_out_when_the_others_go_on(data, tmp_path):
    engine, ground = None, ground_of(data)
    engine = engine_of("packed", ground, tmp_path)
    tasks = {number: task(ground, number, **TRIALS[number]) for number in range(3)}
    for one in tasks.values():
        engine.add(one)
    engine.advance()
    engine.save(tmp_path / "state")
    expected = run(engine, tmp_path)
    engine.close()
    again = engine_of("packed", ground_of(data), tmp_path)
    del tasks[1]
    assert {one.number for one in again.load(tmp_path / "state", tasks)} == {0, 1, 2}
    assert again.numbers == [0, 2]
    left = run(again, tmp_path)
    wanted = {(one.number, one.percent): one.loss for one in expected if one.number != 1}
    assert {(one.number, one.percent): one.loss for one in left} == pytest.approx(wanted, rel=1e-5)
    again.close()


def fail(monkeypatch, when, error):
    """Let the passes of a pack raise where `when(places, engine)` says so."""
    from forge.tuning.engines.packed.pack import Pack

    own = Pack.backward

    def backward(self, places, rows, tokens):
        if when(list(places), self):
            raise error
        own(self, places, rows, tokens)

    monkeypatch.setattr(Pack, "backward", backward)


def plain_run(data, tmp_path, count=3):
    ground = ground_of(data)
    engine = engine_of("packed", ground, tmp_path)
    for number in range(count):
        engine.add(task(ground, number, **TRIALS[number]))
    try:
        return run(engine, tmp_path)
    finally:
        engine.close()


def test_out_of_memory_halves_the_pass_and_loses_nothing(data, tmp_path, monkeypatch, caplog):
    expected = plain_run(data, tmp_path / "one")
    passes = []

    def too_many(places, pack):
        passes.append(len(places))
        return len(passes) > 5 and len(places) > 2

    fail(monkeypatch, too_many, torch.OutOfMemoryError("no more"))
    found = plain_run(data, tmp_path / "two")
    assert figures(found) == figures(expected)
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], rel=1e-5)
    assert "from here on it is 2" in caplog.text
    assert max(passes[7:]) == 2


def test_a_trial_that_does_not_fit_alone_is_told(data, tmp_path, monkeypatch):
    fail(monkeypatch, lambda places, pack: 1 in places and len(pack.slots) == 3, torch.OutOfMemoryError("no more"))
    found = plain_run(data, tmp_path)
    (broken,) = [one for one in found if one.status != "reached"]
    assert (broken.number, broken.status, broken.steps) == (1, "out_of_memory", 0)
    assert "no more" in broken.trace
    assert {one.number for one in found if one.percent == 100} == {0, 2}


def test_a_trial_that_raises_is_told_with_its_trace_and_the_others_go_on(data, tmp_path, monkeypatch):
    expected = {(one.number, one.percent): one.loss for one in plain_run(data, tmp_path / "one")}
    fail(monkeypatch, lambda places, pack: 2 in places, ValueError("a strange row\nand more"))
    found = plain_run(data, tmp_path / "two")
    (broken,) = [one for one in found if one.status != "reached"]
    assert (broken.number, broken.status, broken.why) == (2, "failed", "ValueError: a strange row")
    assert "backward" in broken.trace
    left = {(one.number, one.percent): one.loss for one in found if one.status == "reached"}
    assert left == pytest.approx({key: loss for key, loss in expected.items() if key[0] != 2}, rel=1e-5)


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_a_trial_that_diverges_is_told_before_its_rung(kind, data, tmp_path):
    ground = ground_of(data)
    engine = engine_of(kind, ground, tmp_path, capacity=2)
    engine.add(task(ground, 0, learning_rate=1e-3, num_train_epochs=10))
    engine.add(task(ground, 1, learning_rate=1e30, num_train_epochs=10, warmup_steps=1))
    found = run(engine, tmp_path)
    engine.close()
    (bad,) = [one for one in found if one.status != "reached"]
    assert (bad.number, bad.status) == (1, "diverged")
    assert bad.percent < 25
    assert bad.why
    assert {one.percent for one in found if one.number == 0} == {25.0, 50.0, 100.0}


def test_the_base_can_be_had_in_between(data, tmp_path):
    ground = ground_of(data)
    engine = engine_of("packed", ground, tmp_path)
    for number in range(2):
        engine.add(task(ground, number, **TRIALS[number]))
    expected = plain_run(data, tmp_path / "one", count=2)
    found = list(engine.advance())
    with engine.base() as base:
        assert not any("Packed" in type(module).__name__ for module in base.modules())
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(base(ids).logits, text_model("llama").train()(ids).logits)
    found += run(engine, tmp_path)
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], rel=1e-6)
    engine.close()


def test_arrivals_are_json(data, tmp_path):
    for one in plain_run(data, tmp_path, count=1):
        again = Arrival.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again == one
        assert len(one.curve) > 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"packing": True}, "packing"),
        ({"neftune_noise_alpha": 5}, "neftune"),
        ({"optim": "adafactor"}, "optim"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
    ],
)
def test_what_a_pack_does_not_keep_is_refused_by_it(data, tmp_path, changes, named):
    ground = ground_of(data)
    engine = engine_of("packed", ground, tmp_path)
    with pytest.raises(UnsupportedError, match=f"{named}.*engine='shared'"):
        engine.add(task(ground, 0, **changes))
    assert engine.free == 4
    engine.close()


def test_a_batch_that_the_micro_batch_does_not_divide_is_refused(data, tmp_path):
    ground = Ground(text_model("llama"), tiny_tokenizer(), rows_of(data.train), rows_of(data.validation), 3)
    with pytest.raises(ConflictError, match=r"effective_batch_size=4 is no multiple .* 3"):
        ground.course(task(ground, 0))


def test_the_width_of_the_pack_is_measured(data):
    ground = ground_of(data)
    before = {name: value.clone() for name, value in ground.model.state_dict().items()}
    choice = choose_pack(ground, task(ground, 0), most=4, budget_s=3)
    assert list(choice.seconds) == [1, 2, 4]
    assert choice.width in (1, 2, 4)
    assert all(torch.equal(before[name], value) for name, value in ground.model.state_dict().items())
    refused = choose_pack(ground, task(ground, 0, packing=True), most=4)
    assert (refused.seconds, refused.width) == ({}, 1)
    assert "packing" in str(refused)


@pytest.mark.parametrize(
    ("seconds", "width"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 2.0}, 1),
        ({1: 1.0, 2: 1.2, 4: 2.3}, 2),
        ({1: 1.0, 2: 1.2, 4: 1.4, 8: 9.0}, 4),
        ({}, 1),
    ],
)
def test_a_wider_pack_must_be_clearly_better(seconds, width):
    assert PackChoice(seconds).width == width
