"""Where a number comes from: the versions of what ran, and the machine that it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import forge

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers")


def versions() -> dict[str, str | None]:
    """Of Python, of the packages that matter, and of forge with its commit."""
    own = {"python": platform.python_version(), "forge": forge.__version__, "commit": _commit()}
    return own | {package: installed_version(package) for package in PACKAGES}


def installed_version(package: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, marked "+" when the code differs from it; $FORGE_COMMIT where a copy came without its .git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FORGE_COMMIT")


def machine() -> dict[str, Any]:
    """The CPU, the memory, how busy it is, and the GPU where there is one."""
    import pynvml

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    found: dict[str, Any] = {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found["load"] = round(os.getloadavg()[0], 1)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found["gpu"] = pynvml.nvmlDeviceGetName(handle)
        found["gpu_memory_gb"] = round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1)
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        found["gpu"] = None
    return found
