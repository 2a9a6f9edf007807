"""Whole runs: two processes, a real model, a process that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from support.ddp import rank, run_ddp
from support.resume import kill_and_resume, printed, report


def train(folder, processes, how="off", cached=False, paced=False, resume=False):
    """Three epochs over eight rows with the lower half frozen: 2 x 2 processes, or 2 x 2 accumulated.

    With `resume` it begins anew all the same, and reads what the first process left in the cache.
    """
    from forge import PrefixCache, setup_lp_lora_style
    from support.backward import BackwardProbe
    from support.models import checkpointing, lora, text_model, trainer

    torch.manual_seed(0)
    run = trainer(
        "sft",
        Path(folder, str(processes)),
        text_model(layers=4),
        rows=8,
        max_steps=-1,
        num_train_epochs=3,
        gradient_accumulation_steps=2 // processes,
        ddp_backend="gloo" if processes > 1 else None,
        ddp_find_unused_parameters=False,  # by default DDP and reentrant checkpointing fail together, frozen or not
        trainer_options={"peft_config": lora(), "callbacks": [Steps()] if paced else []},
        **checkpointing(how != "off", use_reentrant=how == "reentrant"),
    )
    setup_lp_lora_style(run.model, 0.5)
    cache = PrefixCache(Path(folder, "cache")).attach(run) if cached else None
    with BackwardProbe(run.model) as probe:
        run.train()
    assert probe.visited == (2, 3), probe.visited
    if cache is not None:
        assert cache.hits > 0
        cache.detach()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    trained = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    save_file({**trained, "losses": torch.tensor(losses)}, Path(folder, f"{processes}-{rank()}.safetensors"))


class Steps(TrainerCallback):
    """Says which step is over."""

    def on_step_end(self, args, state, control, **kwargs):
        report(f"step {state.global_step}")


@pytest.mark.parametrize(
    ("how", "cached"),
    [("reentrant", False), ("non_reentrant", True), pytest.param("off", False, marks=pytest.mark.long)],
)
def test_two_processes_equal_one(tmp_path, how, cached):
    train(str(tmp_path), 1, how)
    arguments = {"folder": str(tmp_path), "how": how, "cached": cached}
    run_ddp("freezing.test_runs:train", processes=2, **arguments)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_killed_run_loses_nothing_that_was_stored(tmp_path):
    """The second process reads what the first had stored when it was killed, and ends where a run without it ends."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    runs = kill_and_resume(
        "freezing.test_runs:train",
        printed("step 1"),
        arguments={"folder": str(killed), "processes": 1, "cached": True, "paced": True},
        cwd=tmp_path,
    )
    assert [run.returncode for run in runs] == [-9, 0]
    train(str(straight), 1)
    left, right = load_file(killed / "1-0.safetensors"), load_file(straight / "1-0.safetensors")
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, msg=name)
    segments = list((killed / "cache").rglob("*.states"))
    assert len(segments) == 2  # each process wrote its own, the second what the first had not come to


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_the_real_model(smollm2, conversations, tmp_path, precision):
    """SmolLM2 on real conversations: the truncated and the cached run are the frozen one, and reach no frozen layer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from forge import PrefixCache, get_preset, setup_lp_lora_style
    from forge.models.layers import unwrap
    from forge.models.truncation import restore
    from support.backward import BackwardProbe
    from support.models import checkpointing

    preset = get_preset("qlora" if precision == "nf4" else "lora", model=str(smollm2), hardware="cpu")
    rows = Dataset.from_list([{"messages": list(messages)} for messages in conversations[:4]])

    def run(how):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(smollm2, **preset.model_kwargs())
        args = SFTConfig(
            str(tmp_path / how),
            use_cpu=True,
            bf16=False,
            max_length=64,
            per_device_train_batch_size=2,
            num_train_epochs=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **checkpointing(use_reentrant=False),
        )
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(smollm2),
            peft_config=preset.get_lora_config(),
            callbacks=preset.get_callbacks(),
        )
        report = setup_lp_lora_style(trainer.model, 0.5)
        if how == "frozen":
            restore(unwrap(trainer.model))
        cache = PrefixCache(tmp_path / "cache").attach(trainer) if how == "cached" else None
        with BackwardProbe(trainer.model) as probe:
            trainer.train()
        assert probe.visited == (tuple(range(30)) if how == "frozen" else report.trainable_layers)
        if how != "frozen":
            assert sum(probe.saved_bytes[index] for index in report.frozen_layers) == 0
        if cache is not None:
            # Once to store, once to hold the first that is read against it; once more without, to see the same.
            assert (probe.forwards[0], probe.forwards[29]) == (3, 4 + 1 + 4)
            cache.detach()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    frozen = run("frozen")
    assert frozen[-1] < frozen[0]
    assert run("truncated") == pytest.approx(frozen, abs=2e-6)
    assert run("cached") == pytest.approx(frozen, abs=2e-6)
