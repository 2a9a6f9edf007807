import sys
import types

import pytest
import torch

from support.models import text_model, trainer
from support.syncs import DeviceReads

SCALARS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool((t > 0).any()),
    "float": lambda t: float(t[0]),
    "int": lambda t: int(t[0]),
    "if": lambda t: 1 if t[0] > 0 else 0,
    "is_nonzero": lambda t: t[0].is_nonzero(),
    "format": lambda t: f"{t[0]:.3f}",
    "library": lambda t: torch.nn.utils.clip_grad_norm_([t], 1.0, error_if_nonfinite=True),
}
HOST = {
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu"),
    "to_device": lambda t: t.to(device="cpu", dtype=torch.float64),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
}
SHAPE = {
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "masked_assignment": lambda t: t.__setitem__(t > 0, 0.0),
    "equal": lambda t: torch.equal(t, t),
    "unique": lambda t: t.unique(),
}
ASYNCHRONOUS = {
    "arithmetic": lambda t: (t * 2 + 1).sum().sqrt(),
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "norm": lambda t: torch.nn.utils.get_total_norm([t]),
    "cast": lambda t: t.to(torch.float64),
    "index": lambda t: t[torch.tensor([0, 1])],
    "slice": lambda t: t[1:2].clone(),
}


def tensor():
    value = torch.tensor([1.0, 2.0, 3.0])
    value.grad = value.clone()
    return value


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, c in (("scalar", SCALARS), ("host", HOST), ("shape", SHAPE)) for n in c]
)
def test_every_kind_of_read_is_seen(kind, name):
    value = tensor()
    with DeviceReads() as reads:
        {"scalar": SCALARS, "host": HOST, "shape": SHAPE}[kind][name](value)
    assert reads.matching(kind=kind)
    with pytest.raises(AssertionError, match="in <lambda>"):
        reads.assert_none()


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_what_does_not_wait_is_not_counted(name):
    value = tensor()
    with DeviceReads() as reads:
        ASYNCHRONOUS[name](value)
    reads.assert_none()


def test_each_read_counts():
    value = tensor()
    with DeviceReads() as reads:
        for element in value:
            element.item()
    assert len(reads.matching(kind="scalar")) == 3


def test_only_reads_that_pass_through_the_package_count():
    guest = types.ModuleType("guest.room")
    exec("def read(t):\n    return t.item()\ndef call(f, t):\n    return f(t)", vars(guest))
    value = torch.tensor(1.0)
    with DeviceReads() as reads:
        value.item()
        guest.read(value)
        guest.call(lambda t: t.item(), value)
    assert len(reads.reads) == 3
    assert len(reads.matching("guest")) == 2
    assert len(reads.matching("guest", below="test_support_syncs")) == 1
    reads.assert_none(inside="gues")
    with pytest.raises(AssertionError, match="2 device reads inside guest"):
        reads.assert_none(inside="guest")


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_a_reading_callback_is_found_in_a_real_training(tmp_path, kind, monkeypatch):
    module = types.ModuleType("guest.callback")
    monkeypatch.setitem(sys.modules, "guest.callback", module)
    exec(
        "from transformers import TrainerCallback\n"
        "class Good(TrainerCallback):\n"
        "    def on_pre_optimizer_step(self, args, state, control, model, **_):\n"
        "        self.norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)\n"
        "class Bad(Good):\n"
        "    def on_pre_optimizer_step(self, *args, **kwargs):\n"
        "        super().on_pre_optimizer_step(*args, **kwargs)\n"
        "        print(self.norm.item())\n",
        vars(module),
    )
    for callback, expected in ((module.Good, 0), (module.Bad, 2)):
        options = {"callbacks": [callback()]}
        subject = trainer(kind, tmp_path, text_model(layers=2), max_steps=2, trainer_options=options)
        with DeviceReads() as reads:
            subject.train()
        assert reads.matching(kind="scalar")  # the trainer's own, such as the logged loss
        assert len(reads.matching("guest", below="transformers.trainer")) == expected
