"""A function in several processes that talk over gloo on the loopback, as `torchrun` starts them.

    run_ddp("callbacks.test_ema_resume:train_in_ddp", folder=str(tmp_path))

The function gets its keywords and `processes` through JSON, and writes what the test shall see to files.
"""

import json
import os
import sys

from support.resume import Run, run_until


def run_ddp(target: str, *, processes: int = 2, timeout_s: float = 180, **arguments: object) -> Run:
    """Run "module:function" in this many processes; all of them must end with 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--no-python"]
    program = [sys.executable, "-m", "support.resume", target, json.dumps({**arguments, "processes": processes})]
    return run_until(
        [sys.executable, *launcher, *program], None, environment={"OMP_NUM_THREADS": "1"}, timeout_s=timeout_s
    )


def rank() -> int:
    """Return this process's number."""
    return int(os.environ.get("RANK", "0"))
