"""What several processes divide among themselves, each on a GPU of its own: the tape of one of them."""

from __future__ import annotations

from collections import defaultdict

from ..scenario import Scenario
from .tape import ALLOCATED, RECATEGORISED, Event, Recording

DIVIDED: dict[str, tuple[str, ...]] = {
    "none": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "parameters", "reference_model"),
    "fsdp": ("optimizer", "gradients", "parameters", "reference_model"),
}


def shared_out(recording: Recording, scenario: Scenario) -> Recording:
    """The recording of one process of several.

    ZeRO divides the optimizer's state, then gradients, then parameters by the number of processes (Rajbhandari et al.
    2019, arXiv:1910.02054); what divides parameters gathers a layer at a time, and the next one beforehand: both are
    counted throughout. DDP keeps a flat copy of the gradients in its buckets, from the beginning (torch docs,
    DistributedDataParallel, `gradient_as_bucket_view`).

    Args:
        recording: of a single process.
        scenario: with its sharding and its number of processes.
    """
    if scenario.sharding == "none":
        return recording
    becomes = {event[1]: event[2] for event in recording.events if event[0] == RECATEGORISED}
    divided = DIVIDED[scenario.sharding]
    events: list[Event] = []
    layers: defaultdict[int, int] = defaultdict(int)
    for event in recording.events:
        if event[0] == ALLOCATED and becomes.get(event[1], event[3]) in divided:
            _, number, size, category, layer = event
            if category == "parameters" and layer is not None:
                layers[layer] += size
            events.append((ALLOCATED, number, -(-size // scenario.world_size), category, layer))
        else:
            events.append(event)
    if scenario.sharding == "ddp":
        buckets = recording.when("2.clip")["gradients"]
        events.insert(0, (ALLOCATED, 0, buckets, "gradients", None))
    elif layers:
        events.insert(0, (ALLOCATED, 0, 2 * max(layers.values()), "workspace", None))
    return Recording(events)
