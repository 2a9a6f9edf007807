"""Every storage is on the tape from its allocation to its end, once."""

from __future__ import annotations

import torch

from forge.memory.tracing.tape import ALLOCATED, FREED, PAGED, RECATEGORISED, Recording, Tape


def test_storages_are_counted_once_and_until_they_die() -> None:
    tape = Tape()
    with tape:
        x = torch.empty(100)
        y = x.view(10, 10).T
        del x
        z = y + 1
        del y
        w = z * 2
    assert [(event[0], event[1]) for event in tape.recording.events] == [
        (ALLOCATED, 1),
        (ALLOCATED, 2),
        (FREED, 1),
        (ALLOCATED, 3),
    ]
    assert tape.recording.peak().total == 800
    del z, w
    assert sum(event[0] == FREED for event in tape.recording.events) == 3


def test_what_was_there_before_belongs_where_it_is_said_to() -> None:
    tape, weight = Tape(), torch.ones(8, requires_grad=True)
    tape.register([weight, weight.view(2, 4)], "parameters", 3)
    with tape:
        weight.register_post_accumulate_grad_hook(lambda p: tape.recategorise(p.grad, "gradients"))
        tape.phase("1.backward", "logits")
        (weight * 2).sum().backward()
    peak = tape.recording.peak()
    assert peak.parts["parameters"] == 32
    alive = tape.recording
    assert any(event[0] == RECATEGORISED and event[2] == "gradients" for event in alive.events)
    weight.grad = None
    assert sum(event[0] == ALLOCATED for event in alive.events) == 1 + sum(e[0] == FREED for e in alive.events)


def test_phases_categories_and_transients() -> None:
    tape = Tape()
    with tape:
        tape.phase("1.forward.layer", layer=5)
        x = torch.empty(4)
        with tape.allocating("workspace"):
            y = torch.empty(8)
        tape.transient(1000)
    peak = tape.recording.peak()
    assert (peak.phase, peak.layer, peak.total) == ("1.forward.layer", 5, 1048)
    assert peak.parts["activations"] == 16
    assert peak.parts["workspace"] == 1032
    assert list(tape.recording.blocks()) == [(1, 16), (2, 32), (3, 1000), (3, -1)]
    del x, y


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    recording = Recording([(ALLOCATED, 1, 1, "activations", None), (ALLOCATED, 2, 513, "activations", None)])
    assert recording.peak().total == 514
    assert recording.peak(512).total == 1536


def test_paged_memory_is_beside_the_allocator() -> None:
    tape, weight = Tape(), torch.ones(8)
    tape.register([weight], "parameters", 2)
    tape.paged(1 << 20, weight)
    recording = tape.recording
    assert recording.paged == 1 << 20
    assert recording.peak().total == 32
    assert list(recording.blocks()) == [(1, 32)]
    assert recording.events[-1][3:] == (PAGED, 2)
