"""The study of what an estimate costs: its cells, and one of each kind on a tiny model."""

import pytest
from benchmarks.gpu.shapes import SHAPES
from benchmarks.runner import Suite, key, run

from benchmarks import memory_engine


def test_the_cells_are_of_three_kinds_and_of_known_shapes():
    cells = memory_engine.SUITE.cells
    assert {cell["measures"] for cell in cells} == {"cost", "says", "fact"}
    assert {cell["model"] for cell in cells} <= SHAPES.keys()
    assert len({key(cell) for cell in cells}) == len(cells)


@pytest.mark.parametrize("measures", ["cost", "says"])
def test_a_cell_runs(measures, tmp_path):
    cell = {"measures": measures, "model": "llama-tiny", "method": "nf4", "trainer": "sft", "rows": 2, "length": 64}
    suite = Suite("test", "benchmarks.memory_engine:measure", (cell,), timeout_s=200)
    (row,) = run(suite, tmp_path / "rows.jsonl").values()
    assert row["status"] == "ok", row
    assert row["result"]["estimate"]["allocated_peak_gb"] > 0
    if measures == "cost":
        assert 0 <= row["result"]["resident_rise_gb"] < 1
        assert row["result"]["estimate_s"] > 0
    else:
        assert {"accelerate", "fitcheck"} == row["result"]["peers"].keys()


def test_a_fact_is_compared_in_its_own_unit():
    found = memory_engine.measure({"measures": "fact", "model": "phi3-mini", "method": "nf4", "reported_gb": 2.21})
    assert found["unit_bytes"] == 10**9
    assert found["forge_gb"] == pytest.approx(2.206, abs=0.002)
