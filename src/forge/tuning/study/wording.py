"""Settings and figures in the words and digits that people use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHORT = {
    "learning_rate": "lr",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "warmup_steps": "warm-up",
    "effective_batch_size": "batch",
    "target_modules": "targets",
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "freeze_ratio": "frozen",
    "num_train_epochs": "epochs",
}
STATUS = {
    "completed": "completed",
    "stopped": "stopped on evidence",
    "diverged": "diverged",
    "infeasible": "infeasible",
    "out_of_memory": "out of memory",
    "failed": "failed",
    "running": "on the way",
    "waiting": "waiting",
}


def figure(value: Any) -> str:
    """A setting's value, short.

    >>> [figure(one) for one in (0.000213, 0.05, 16, True, "all-linear", ["q_proj", "v_proj"], 0.0012)]
    ['2.1e-4', '0.05', '16', 'yes', 'all-linear', 'q_proj+v_proj', '0.0012']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            digits, _, power = f"{value:.1e}".partition("e")
            return f"{digits.removesuffix('.0')}e{int(power)}"
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return str(value)


def settings_line(params: Mapping[str, Any], *, most: int = 2) -> str:
    """The settings of a trial on one line, the most telling first.

    >>> settings_line({"lora_dropout": 0.0, "lora_r": 16, "learning_rate": 2.1e-4})
    'lr 2.1e-4, r 16'
    """
    ordered = [*(name for name in SHORT if name in params), *(name for name in params if name not in SHORT)]
    return ", ".join(f"{SHORT.get(name, name)} {figure(params[name])}" for name in ordered[:most])


def count(number: int, what: str) -> str:
    """A number and what is counted.

    >>> count(1, "trial"), count(3, "trial")
    ('1 trial', '3 trials')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(42), duration(754), duration(7300)
    ('42 s', '13 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
