"""Sums over a model's pieces: by part of the model, by dtype, and what is packed with which method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...models.anatomy import numberless
from ...models.experts import is_linear
from .pieces import ADAPTERS, EMBEDDINGS, HEAD, LAYERS, OTHER, Piece, Pieces

# None stands for names that a model has given.
_ORDER = (EMBEDDINGS, LAYERS, "final norm", HEAD, None, OTHER, ADAPTERS)
_ORDER_INSIDE = ("attention", "state space", "mlp", "experts", "router", "norms", None, OTHER)


@dataclass(frozen=True)
class Part:
    """A share of a model.

    Args:
        name: what it is, in forge's words or by its path in the model.
        parameters: how many, 4-bit ones unpacked.
        trainable: how many of them require a gradient.
        dtypes: of its parameters, the largest share first; the method for packed ones.
        bytes: parameters, buffers and quantisation constants.
        inside: the part that this one belongs to; "" for one of the whole model.
    """

    name: str
    parameters: int
    trainable: int
    dtypes: tuple[str, ...]
    bytes: int
    inside: str = ""


@dataclass(frozen=True)
class Quantized:
    """The layers that bitsandbytes packed with one method.

    Args:
        method: "nf4", "fp4" or "int8".
        num_layers: how many.
        layers: their names, "*" for a number.
        parameters: how many weights they hold.
        weight_bytes: of the packed weights.
        constants: what unpacks them, in bytes: "absmax", "nested absmax", "codebooks", "offset", "SCB".
    """

    method: str
    num_layers: int
    layers: tuple[str, ...]
    parameters: int
    weight_bytes: int
    constants: tuple[tuple[str, int], ...]


def grouped(pieces: Iterable[Piece], key: Callable[[Piece], str], *, inside: str = "") -> tuple[Part, ...]:
    """The sums of the pieces with the same key, the most parameters first."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(key(piece), []).append(piece)
    parts = [
        Part(
            name=name,
            parameters=sum(piece.count for piece in group),
            trainable=sum(piece.count for piece in group if piece.trainable),
            dtypes=_dtypes(group),
            bytes=sum(piece.bytes for piece in group),
            inside=inside,
        )
        for name, group in groups.items()
    ]
    return tuple(sorted(parts, key=lambda part: -part.parameters))


def _dtypes(pieces: Iterable[Piece]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for piece in pieces:
        if piece.kind == "parameter":
            counts[piece.dtype] = counts.get(piece.dtype, 0) + piece.count
    return tuple(sorted(counts, key=lambda dtype: -counts[dtype]))


def parts_of(pieces: Pieces) -> tuple[Part, ...]:
    """The whole model, in the order in which people think of it; a part's own parts follow it."""
    parts = list(grouped(pieces.all, lambda piece: piece.part))
    if pieces.head_is_tied and all(part.name != HEAD for part in parts):
        parts.append(Part(HEAD, 0, 0, (), 0))
    ordered: list[Part] = []
    for part in sorted(parts, key=lambda part: _rank(part.name, _ORDER)):
        ordered.append(part)
        if part.name in (LAYERS, ADAPTERS):
            own = (piece for piece in pieces.all if piece.part == part.name)
            inner = grouped(own, lambda piece: piece.inside, inside=part.name)
            ordered += sorted(inner, key=lambda part: _rank(part.name, _ORDER_INSIDE))
    return tuple(ordered)


def _rank(name: str, order: tuple[str | None, ...]) -> int:
    return order.index(name if name in order else None)


def quantized_in(parameters: Iterable[Piece], constants: Iterable[Piece]) -> tuple[Quantized, ...]:
    """The packed layers by method."""
    packed = [piece for piece in parameters if piece.packed]
    return tuple(
        Quantized(
            method=group.name,
            num_layers=len({piece.module for piece in packed if piece.dtype == group.name}),
            layers=_unique(numberless(piece.module) for piece in packed if piece.dtype == group.name),
            parameters=group.parameters,
            weight_bytes=group.bytes,
            constants=tuple(
                (part.name, part.bytes)
                for part in grouped((c for c in constants if c.dtype == group.name), lambda piece: piece.kind)
                if part.bytes
            ),
        )
        for group in grouped(packed, lambda piece: piece.dtype)
    )


def unquantized_in(pieces: Pieces, parameters: Iterable[Piece]) -> tuple[str, ...]:
    """The linear layers and fused experts that are not packed, "*" for a number."""
    packed = {piece.module for piece in parameters if piece.packed}
    linears = [name for name, module in pieces.modules.items() if is_linear(module) and name not in packed]
    return _unique(numberless(name) for name in (*linears, *pieces.fused_experts))


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
