"""What the probe found, as numbers and as a table."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

from ..reporting import Table
from .costs import StepCost

_SHOWN = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class ProbedLayer:
    """One decoder layer, averaged over the batches.

    Args:
        trains: whether anything in it does.
        gradient_sum: of the absolute values of its gradient; None where nothing in any layer trains.
        gradient_norm: the root of the mean of its squared norms; None likewise.
        importance: 1 - cosine similarity of its input and output.
    """

    trains: bool
    gradient_sum: float | None
    gradient_norm: float | None
    importance: float


@dataclass(frozen=True)
class Boundary:
    """What freezing the lowest layers would give up and save. Shares are of all decoder layers together.

    Args:
        frozen_layers: how many of the lowest.
        freeze_ratio: what `setup_lp_lora_style` makes that number of.
        gradient_share: of the sum of |gradient|: what AdamW's first step gives up; None where nothing trains.
        squared_share: of the squared gradient norm: what SGD's gives up; None likewise.
        importance_share: of the layers' importance.
        error: standard error of the share that the rule reads; None for a single batch.
        cost: of a step; None where the model's FLOPs cannot be counted.
    """

    frozen_layers: int
    freeze_ratio: float
    gradient_share: float | None
    squared_share: float | None
    importance_share: float
    error: float | None
    cost: StepCost | None

    @property
    def share(self) -> float:
        """The share that the rule reads: the gradient's, or the importance's where nothing trains."""
        return self.importance_share if self.gradient_share is None else self.gradient_share


@dataclass(frozen=True, repr=False)
class FreezeSuggestion:
    """What the probe found; made by `suggest_freeze_ratio`.

    Args:
        freeze_ratio: for `setup_lp_lora_style`.
        frozen_layers: how many layers that is.
        num_layers: of how many.
        reason: why this share, in sentences.
        within_noise: whether other batches like these could as well have led to another share; true of a single one.
        plausible: the fewest and the most layers that they could have led to; None for a single batch.
        measure: what the rule read.
        tolerance: how much of it was allowed.
        already_frozen: how many of the lowest layers do not train as it is.
        batches: how many were probed.
        tokens: how many real tokens they had.
        layers: the measurements, the lowest first.
        boundaries: every number of layers that can be frozen, none of them first.
    """

    freeze_ratio: float
    frozen_layers: int
    num_layers: int
    reason: str
    within_noise: bool
    plausible: tuple[int, int] | None
    measure: Literal["gradient", "importance"]
    tolerance: float
    already_frozen: int
    batches: int
    tokens: int
    layers: tuple[ProbedLayer, ...]
    boundaries: tuple[Boundary, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def print(self) -> None:
        """Show a few shares and the suggested one as a table."""
        self._table().print()

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        noise = ", within noise" if self.within_noise else ""
        return (
            f"FreezeSuggestion(freeze_ratio={self.freeze_ratio}, {self.frozen_layers} of {self.num_layers} layers, "
            f"{said(self.boundaries[self.frozen_layers])} of the {self.measure}{noise})"
        )

    def _table(self) -> Table:
        counted = self.boundaries[0].cost is not None
        header = ["freeze_ratio", "layers", *(["AdamW", "SGD"] if self.measure == "gradient" else []), "importance"]
        header += ["step", "cached", "ckpt", "cached"] if counted else []
        title = f"{self.num_layers} decoder layers, {self.batches} batches, {self.tokens:,} tokens"
        table = Table(tuple(header), title=f"{title}: what the lowest layers hold")
        for number in sorted({int(share * self.num_layers) for share in _SHOWN} | {self.frozen_layers}):
            row = self.boundaries[number]
            noise = f"±{row.error:.1%}" if row.error and number else ""
            table.add(
                f"{row.freeze_ratio:g}{' *' if number == self.frozen_layers else ''}",
                "none" if not number else "0" if number == 1 else f"0-{number - 1}",
                f"{row.share:.1%}".removesuffix("%" if noise else "") + noise,
                *([] if row.squared_share is None else [f"{row.squared_share:.1%}", f"{row.importance_share:.1%}"]),
                *([] if row.cost is None else [f"{cost:.2f}" for cost in astuple(row.cost)]),
            )
        table.footer = f"* {self.reason}\n"
        if self.measure == "gradient":
            table.footer += "AdamW, SGD: of what its first step would gain. "
        table.footer += "importance: of what the layers change in what passes."
        if counted:
            table.footer += (
                "\nstep: FLOPs, 1 with no layer frozen. cached: with a PrefixCache. ckpt: with checkpointing."
            )
        return table


def said(boundary: Boundary) -> str:
    """The share that the rule reads, with its error."""
    noise = f" ± {boundary.error:.1%}" if boundary.error and boundary.frozen_layers else ""
    return f"{boundary.share:.1%}{noise}"
