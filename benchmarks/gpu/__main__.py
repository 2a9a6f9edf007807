"""`python -m benchmarks.gpu` runs the matrix, `... --smoke` tiny shapes on a CPU; `... report` makes its tables."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.matrix import SMOKE, SUITE
from benchmarks.runner import RESULTS, add_options, run_as_asked


def main() -> int:
    """Run, smoke or report, as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--smoke", action="store_true", help="the same code with tiny shapes on the CPU; rows not kept")
    add_options(parser)
    options = parser.parse_args()
    if options.action == "report":
        from benchmarks.gpu.memory_report import chart as memory_chart
        from benchmarks.gpu.report import render
        from benchmarks.runner import last_rows

        path = options.results or RESULTS / "gpu.jsonl"
        rows = list(last_rows(path).values())
        print(render(rows))
        if (chart := memory_chart(rows)) is not None:
            chart.save(path.with_name(f"{path.stem}-memory.png"))
            print(f"\n![{chart.alt}]({path.stem}-memory.png)")
        return 0
    if options.smoke:
        return _smoke(options)
    if not options.list and (missing := _no_cuda()):
        print(f"the GPU matrix needs a CUDA device: {missing} (--smoke runs tiny shapes on the CPU)", file=sys.stderr)
        return 1
    return run_as_asked(SUITE, options)


def _smoke(options: argparse.Namespace) -> int:
    # All in this process, on the CPU also where there is a GPU: what is tested is the code. One thread is faster here.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FORGE_BENCH_CACHE"] = folder
        options.results = options.results or Path(folder, "gpu-smoke.jsonl")
        return run_as_asked(SMOKE, options)


def _no_cuda() -> str | None:
    """Why there is no CUDA device to run on, asked of the driver: this process must not take memory on the GPU."""
    import pynvml
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    try:
        pynvml.nvmlInit()
        return None if pynvml.nvmlDeviceGetCount() else "the driver sees none"
    except pynvml.NVMLError as error:
        return f"the driver does not answer ({error})"


if __name__ == "__main__":
    sys.exit(main())
