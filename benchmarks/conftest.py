"""What pytest-benchmark writes: without the host's name and the single timings, with the versions of what ran."""

from typing import Any

from benchmarks.provenance import machine, versions

_KEPT = ("min", "median", "iqr", "max", "rounds")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep what says something about forge."""
    output_json["machine_info"], output_json["versions"] = machine(), versions()
    output_json.pop("commit_info", None)
    output_json["benchmarks"] = [
        {name: one[name] for name in ("group", "name", "extra_info")} | {k: one["stats"][k] for k in _KEPT}
        for one in output_json["benchmarks"]
    ]
