"""The loss traced is the one that the installed trainers run, and their own `train()` costs the same.

What a trainer adds is small and known: the collator's tensors are int64 and made outside of the step, numbers are
gathered for the log, and the model's fp32 outputs of accelerate.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import trl

from forge.memory.scenario import Scenario
from forge.memory.tracing.tape import ALLOCATED, Tape
from support.models import checkpointing as switched
from support.models import lora, text_model
from support.steps import hollow_step, source

LENGTH = 48
CLASSES = {"plain": transformers.Trainer, "sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}


def rows(kind: str, count: int = 8) -> Any:
    """Rows of one length, so that nothing is padded."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 200, (length,), generator=generator).tolist()

    if kind == "dpo":
        answer = "a b c d e f g h"
        return Dataset.from_list([{"prompt": "what follows?", "chosen": answer, "rejected": answer}] * count)
    found = [{"input_ids": (ids := tokens(LENGTH)), "labels": ids} for _ in range(count)]
    if kind == "plain":
        return Dataset.from_list([{**row, "attention_mask": [1] * LENGTH} for row in found])
    return Dataset.from_list([{"input_ids": row["input_ids"]} for row in found])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("kind", "adapter", "checkpointing"),
    [
        ("plain", False, "off"),
        ("plain", True, "reentrant"),
        ("sft", False, "non_reentrant"),
        ("sft", True, "off"),
        ("sft", True, "reentrant"),
        ("dpo", True, "off"),
        ("dpo", False, "non_reentrant"),
    ],
)
def test_a_real_run_costs_what_is_traced(
    kind: Any, adapter: bool, checkpointing: Any, bf16: bool, make_trainer: Any
) -> None:
    options: dict[str, Any] = {"train_dataset": rows(kind)}
    model = text_model(layers=2)
    if adapter and kind == "plain":
        import peft

        model = peft.get_peft_model(model, lora())
    elif adapter:
        options["peft_config"] = lora()
    extra = {"max_length": LENGTH} if kind != "plain" else {}
    if checkpointing != "off":
        extra |= switched(use_reentrant=checkpointing == "reentrant")
    trainer = make_trainer(kind, model, trainer_options=options, bf16=bf16, **extra)
    length = next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1]
    real = _trained(trainer)
    scenario = Scenario(
        batch_size=2,
        sequence_length=length,
        device="cpu",
        trainer=kind,
        dtype=None,
        autocast="bf16" if bf16 else None,
        peft_config=lora() if adapter else None,
        fp32_trainable=False,
        checkpointing=checkpointing,
        reference="none" if kind != "dpo" else "adapter_off" if adapter else "copy",
    )
    traced = hollow_step(source("llama", 2, vocab_size=256), scenario)
    assert traced.peak().total == pytest.approx(real, rel=0.01)


def _trained(trainer: Any) -> int:
    """The most bytes alive while the trainer trains."""
    tape = Tape()
    for each in (trainer.model, getattr(trainer, "ref_model", None)):
        if each is not None:
            tape.register((*each.parameters(), *each.buffers()), "parameters")
            for module in each.modules():
                tape.register((t for t in vars(module).values() if isinstance(t, torch.Tensor)), "parameters")
    with tape:
        trainer.train()
    return tape.recording.peak().total


@pytest.mark.parametrize("kind", CLASSES)
def test_the_loss_is_that_of_the_installed_class(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    compute_loss: Any = CLASSES[kind].compute_loss

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(type(self))
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(CLASSES[kind], "compute_loss", spy)
    reference: Any = "precomputed" if kind == "dpo" else "none"
    hollow_step(source(), Scenario(trainer=kind, reference=reference, device="cpu"))
    assert called == [CLASSES[kind]] * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", CLASSES)
def test_whole_logits_exist_only_where_the_trainer_makes_them(kind: Any, device: Any) -> None:
    """TRL's fused head works in tiles of 4,096 tokens; `Trainer` has logits of all, in fp32 too."""
    reference: Any = "precomputed" if kind == "dpo" else "none"
    vocabulary, rows_, length = 32_768, 8, 2048
    scenario = Scenario(trainer=kind, reference=reference, device=device, batch_size=rows_, sequence_length=length)
    recording = hollow_step(source("llama", vocab_size=vocabulary), scenario)
    largest = max(event[2] for event in recording.events if event[0] == ALLOCATED)
    whole = scenario.rows * length * vocabulary * 2  # bytes in bfloat16
    if kind == "plain":
        assert largest >= 2 * whole
    else:
        assert largest < whole
