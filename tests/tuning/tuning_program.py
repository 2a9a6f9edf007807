"""A tuning run as a program of its own, which reports where it is and can be killed there (support/resume.py).

Lines: `step N` at the end of each optimizer step, `base evaluated`, `trained`, `adapter written`, `tuned evaluated`,
`saving N` inside of the Trainer's checkpoint N, when the weights are written and the optimizer is not.
"""

import json
from pathlib import Path
from typing import Any

import transformers

from support.resume import report
from tuning.conftest import chats, small


def conversations() -> list[dict[str, Any]]:
    from forge.assets import conversations

    return [{"messages": chat[:4]} for chat in conversations(limit=60) if len(chat) >= 4]


def pairs() -> list[dict[str, str]]:
    return [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]


# The preset says what is learnt from; with QLoRA it is the real thing.
ROWS = {"lora": lambda: chats(40), "dpo": pairs, "qlora": conversations}


class StepReport(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report(f"step {state.global_step}")


def run(model: str, output_dir: str, preset: str = "lora", resume: bool = False, **fields: Any) -> None:
    import torch

    from forge.tuning import LoRATuner, TuningConfig, stages, training

    torch.set_num_threads(1)
    _report_after(stages.Stages, "_evaluated", lambda arguments: f"{arguments[1]} evaluated")
    _report_after(training.Trained, "__init__", lambda _: "trained")
    _report_after(stages, "save_adapter", lambda _: "adapter written")
    _report_before(
        transformers.Trainer, "_save_optimizer_and_scheduler", lambda own: f"saving {own[0].state.global_step}"
    )
    config = TuningConfig(**{**small(Path(output_dir)), **fields})
    result = LoRATuner(model, ROWS[preset](), 8, preset=preset, config=config, callbacks=[StepReport()]).run()
    Path(output_dir, "metrics.json").write_text(json.dumps(dict(result.metrics)))


def _report_after(owner: Any, name: str, line: Any) -> None:
    original = getattr(owner, name)

    def reporting(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        report(line(args))
        return output

    setattr(owner, name, reporting)


def _report_before(owner: Any, name: str, line: Any) -> None:
    original = getattr(owner, name)

    def reporting(*args: Any, **kwargs: Any) -> Any:
        report(line(args))
        return original(*args, **kwargs)

    setattr(owner, name, reporting)
