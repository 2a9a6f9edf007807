"""The table in docs/memory.md is the one that the committed rows make."""

from benchmarks.provenance import ROOT
from benchmarks.runner import RESULTS, key, last_rows

from benchmarks import memory_tables


def test_the_page_shows_the_rows():
    rows = last_rows(RESULTS / "memory_tables.jsonl")
    assert {key(cell) for cell in memory_tables.SUITE.cells} == set(rows)
    assert memory_tables.table(rows) in (ROOT / "docs" / "memory.md").read_text()


def test_a_cell_is_estimated():
    cell = {"model": "llama-tiny", "preset": "lora", "rows": 1, "length": 64}
    found = memory_tables.measure(cell)
    assert found["engine"] == "trace"
    assert found["num_parameters"] > 0
