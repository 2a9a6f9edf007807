"""What `import forge` costs in a fresh process: beside a bare Python, and as that process sees it (extra_info)."""

import statistics
import subprocess
import sys
from typing import Any

import pytest

TIMED_IMPORT = "import time; begin = time.perf_counter(); import forge; print(time.perf_counter() - begin)"


@pytest.mark.parametrize("code", ["pass", TIMED_IMPORT], ids=["bare Python", "import forge"])
def test_import_time(benchmark: Any, code: str) -> None:
    """A process that imports forge, and one that does nothing."""
    benchmark.group = "a fresh process"
    seconds: list[float] = []

    def start() -> None:
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seconds.extend(map(float, out.split()))

    benchmark.pedantic(start, rounds=20, warmup_rounds=2)
    if seconds:
        benchmark.extra_info["import_forge_ms"] = round(1000 * statistics.median(seconds), 2)


def test_first_preset(benchmark: Any) -> None:
    """A process that imports forge and builds a preset with its objects: most of it is torch, transformers and TRL."""
    benchmark.group = "a fresh process"
    code = 'from forge import get_preset; p = get_preset("qlora", hardware="cpu"); p.get_lora_config()'
    command = [sys.executable, "-W", "ignore", "-c", f"{code}; p.get_sft_config()"]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=3, warmup_rounds=1)
