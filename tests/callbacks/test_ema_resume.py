"""What only separate processes show: kill -9, and two of them training together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.ddp import rank, run_ddp
from support.resume import printed


def small(folder):
    from peft import get_peft_model

    from support.models import lora, text_model

    return "sft", get_peft_model(text_model(layers=2), lora(lora_dropout=0.1))


def full(folder):
    from support.models import text_model

    return "plain", text_model(layers=2)


def real(folder):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from forge import assets
    from support.models import lora

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    return "plain", get_peft_model(model, lora(lora_dropout=0.1))


MODELS = {"small": small, "full": full, "real": real}


def train(folder, model, steps=20, resume=False, straight=False):
    """Train with a checkpoint in the middle; dropout and shuffling make every random number count."""
    from transformers import TrainerCallback

    from forge import EMACallback
    from support.models import trainer
    from support.resume import report

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if not straight:
                report(f"step {state.global_step}")

    torch.manual_seed(0)
    kind, subject = MODELS[model](folder)
    ema = EMACallback()
    run = trainer(
        kind,
        Path(folder),
        subject,
        rows=24,
        max_steps=steps,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=steps // 2,
        trainer_options={"callbacks": [ema, Report()]},
    )
    run.train(resume_from_checkpoint=resume)
    raw = {name: value.detach() for name, value in subject.named_parameters() if value.requires_grad}
    save_file(raw, Path(folder, "raw.safetensors"))
    save_file(ema.state_dict()["average"], Path(folder, "average.safetensors"))


@pytest.mark.parametrize("model", ["small", "full", pytest.param("real", marks=[pytest.mark.long, pytest.mark.real])])
def test_twenty_steps_equal_ten_a_kill_and_ten(model, kill_and_resume, tmp_path):
    steps = 20
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    runs = kill_and_resume(
        "callbacks.test_ema_resume:train",
        printed("step 13"),
        arguments={"folder": str(killed), "model": model, "steps": steps},
        timeout_s=900,
    )
    assert [run.returncode for run in runs] == [-9, 0]
    assert "step 10" not in runs[1].lines  # it really went on
    assert "step 11" in runs[1].lines
    straight.mkdir()
    train(str(straight), model, steps, straight=True)
    for file in ("raw.safetensors", "average.safetensors"):
        left, right = load_file(killed / file), load_file(straight / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


def train_in_ddp(folder, processes):
    """The same 4 sequences per step: 2 x 2 processes, or 2 x 2 accumulated."""
    from peft import get_peft_model

    from forge import EMACallback
    from support.models import lora, text_model, trainer

    torch.manual_seed(0)
    model = get_peft_model(text_model(layers=2), lora())
    ema = EMACallback(half_life_steps=3)
    run = trainer(
        "plain",
        Path(folder, str(processes)),
        model,
        max_steps=4,
        learning_rate=1e-2,
        gradient_accumulation_steps=2 // processes,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        ddp_backend="gloo" if processes > 1 else None,
        trainer_options={"callbacks": [ema], "eval_dataset": _rows()},
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    average = {**ema.state_dict()["average"], "losses": torch.tensor(losses)}
    save_file(average, Path(folder, f"{processes}-{rank()}.safetensors"))


def _rows():
    from support.data import lm_tokens

    return lm_tokens(8, seed=3)


def test_two_processes_equal_one(tmp_path):
    train_in_ddp(str(tmp_path), 1)
    run_ddp("callbacks.test_ema_resume:train_in_ddp", folder=str(tmp_path), processes=2)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-6, msg=name)
    assert (tmp_path / "2" / "checkpoint-4" / "ema" / "average.safetensors").is_file()
