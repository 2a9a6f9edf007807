"""A `ModelInfo` as two tables: what there is, and where in the model it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...reporting import Table
from .pieces import HEAD

if TYPE_CHECKING:
    from .model import ModelInfo


def summary(info: ModelInfo) -> Table:
    """Counts, dtypes, quantised layers, ties and memory."""
    named = info.name if info.name == info.model_class else f"{info.name} ({info.model_class})"
    table = Table(("model", named))
    adapters = f", and {_count(info.adapter_parameters)} in adapters" if info.adapter_parameters else ""
    table.add("parameters", f"{_count(info.num_parameters)}{adapters}")
    share = "<0.01%" if 0 < info.trainable_share < 1e-4 else f"{info.trainable_share:.2%}"
    table.add("trainable", f"{_count(info.trainable_parameters)}, {share}; frozen {_count(info.frozen_parameters)}")
    for number, part in enumerate(info.dtypes):
        table.add("" if number else "dtypes", f"{part.name}: {_count(part.parameters)}, {_size(part.bytes)}")
    for packed in info.quantized:
        names = _short(packed.layers, info.layers_path)
        table.add("quantised", f"{packed.num_layers} layers to {packed.method}: {names}")
        constants = ", ".join(f"{name} {_size(size)}" for name, size in packed.constants)
        if constants:
            table.add("", f"constants beside them: {constants}")
    if info.quantized:
        table.add("not quantised", _short(info.unquantized, info.layers_path) or "no linear layer")
    found = info.num_layers is not None
    table.add("layers", f"{info.num_layers} in {info.layers_path}" if found else f"not found: {info.layers_missing}")
    table.add("tied weights", _first([" = ".join(names) for names in info.tied], "; ", limit=4) or "none")
    for number, adapter in enumerate(info.adapters):
        table.add("" if number else "adapters", adapter)
    table.add("buffers", f"{info.num_buffers}, {_size(info.buffer_bytes)}")
    table.add("memory", _memory(info))
    for note in info.notes:
        table.add("note", note)
    return table


def breakdown(info: ModelInfo, *, title: str = "") -> Table:
    """Parameters and memory by part; the parts of a part are indented below it."""
    outer = [part for part in info.parts if not part.inside]
    rows = [
        ("part", "parameters", "trainable", "GiB", "dtypes"),
        *(
            (
                f"  {part.name}" if part.inside else part.name,
                f"{part.parameters:,}",
                f"{part.trainable:,}",
                _gib(part.bytes),
                ", ".join(part.dtypes) or ("tied" if part.name == HEAD else "buffers"),
            )
            for part in info.parts
        ),
        (
            "total",
            f"{sum(part.parameters for part in outer):,}",
            f"{sum(part.trainable for part in outer):,}",
            _gib(sum(part.bytes for part in outer)),
            "",
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    aligned = [tuple(cell.rjust(widths[i]) if 1 <= i <= 3 else cell for i, cell in enumerate(row)) for row in rows]
    table = Table(aligned[0], title=title)
    for row in aligned[1:]:
        table.add(*row)
    return table


def _memory(info: ModelInfo) -> str:
    shares = {
        "parameters": info.parameter_bytes,
        "quantisation constants": info.constant_bytes,
        "buffers": info.buffer_bytes,
    }
    where = f" on {', '.join(info.devices)}" if info.devices else ""
    listed = ", ".join(f"{name} {_size(size)}" for name, size in shares.items() if size)
    return f"{_size(info.memory_bytes)}{where} ({listed or 'nothing'})"


def _count(number: int) -> str:
    """All digits, and the number as people say it.

    >>> _count(8_030_261_248), _count(134_515_008), _count(576)
    ('8,030,261,248 (8.03B)', '134,515,008 (134.5M)', '576')
    """
    said = f" ({number / 1e9:.2f}B)" if number >= 1e9 else f" ({number / 1e6:.1f}M)" if number >= 1e6 else ""
    return f"{number:,}{said}"


def _gib(size: int) -> str:
    """Bytes in GiB, for a column of them.

    >>> _gib(2**31), _gib(2**15), _gib(0)
    ('2.000', '<0.001', '0')
    """
    return "0" if not size else "<0.001" if size < 2**30 / 2000 else f"{size / 2**30:.3f}"


def _size(size: int) -> str:
    """Bytes in the unit that suits them.

    >>> _size(16_060_522_496), _size(1_914_360), _size(256)
    ('14.958 GiB', '1.8 MiB', '256 bytes')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power / (10 if unit == "GiB" else 1):
            return f"{size / 2**power:.{3 if unit == 'GiB' else 1}f} {unit}"
    return f"{size} bytes"


def _short(names: Sequence[str], layers_path: str | None) -> str:
    return _first([name.removeprefix(f"{layers_path}.*.") for name in names], ", ", limit=12)


def _first(items: Sequence[str], separator: str, *, limit: int) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return f"{separator.join(items[:limit])}{more}"
