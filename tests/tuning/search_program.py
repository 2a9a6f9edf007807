"""A search as a program of its own, which reports where it is and can be killed there (support/resume.py).

Lines: `asked N` when trial N belongs to this crew, `passes N` every tenth pass through the model, `saved N` after the
Nth checkpoint, `finished N` when trial N is over, `concluded`.
"""

import itertools
import logging
from pathlib import Path
from typing import Any

from support.resume import report
from tuning.conftest import chats, searching


def run(model: str, output_dir: str, resume: bool = False, **fields: Any) -> None:
    import torch

    from forge.tuning import BayesianLoRATuner, TuningConfig
    from forge.tuning.engines.packed.engine import PackedEngine
    from forge.tuning.engines.packed.pack import Pack
    from forge.tuning.study.ledger import Ledger

    logging.getLogger("forge").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    saves, passes = itertools.count(1), itertools.count(1)
    _after(Ledger, "ask", lambda _, output: f"asked {output.number}" if output else "")
    _after(Ledger, "finish", lambda arguments, _: f"finished {arguments[1]}")
    _after(PackedEngine, "save", lambda *_: f"saved {next(saves)}")
    _after(Pack, "backward", lambda *_: f"passes {count}" if (count := next(passes)) % 10 == 0 else "")
    config = TuningConfig(**{**searching(Path(output_dir)), **fields})
    BayesianLoRATuner(model, chats(40), 8, preset="lora", config=config).run()
    report("concluded")


def _after(owner: Any, name: str, line: Any) -> None:
    original = getattr(owner, name)

    def reporting(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if said := line(args, output):
            report(said)
        return output

    setattr(owner, name, reporting)
