"""What was frozen, for people, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FreezeReport:
    """What `setup_lp_lora_style` did to a model.

    Args:
        decoder_layers: the dotted path of the decoder's layers.
        num_layers: how many the decoder has.
        frozen_layers: the indices of those that do not train, ascending.
        boundary: the lowest layer that backward visits; all below it are frozen.
        frozen_parameters: how many parameters would train without this, adapters that were removed included.
        trainable_parameters: how many do train.
        adapters_removed: how many of PEFT's layers were taken out of the frozen ones.
        embeddings_frozen: the names of the parameters before the first layer that were frozen.
        exclude_modules: for a `LoraConfig` that comes later: a pattern that keeps it out of the frozen layers; None
            where none is frozen.
    """

    decoder_layers: str
    num_layers: int
    frozen_layers: tuple[int, ...]
    boundary: int
    frozen_parameters: int
    trainable_parameters: int
    adapters_removed: int
    embeddings_frozen: tuple[str, ...]
    exclude_modules: str | None
    _undo: Callable[[], None] = field(repr=False, compare=False)

    @property
    def freeze_ratio(self) -> float:
        """The share of the layers that is frozen."""
        return len(self.frozen_layers) / self.num_layers

    @property
    def trainable_layers(self) -> tuple[int, ...]:
        """The indices of the layers that are not frozen, ascending; also for `LoraConfig(layers_to_transform=...)`."""
        return tuple(index for index in range(self.num_layers) if index not in set(self.frozen_layers))

    def __str__(self) -> str:
        return (
            f"{len(self.frozen_layers)} of {self.num_layers} decoder layers frozen ({_ranges(self.frozen_layers)}); "
            f"backward stops below layer {self.boundary}; {self.trainable_parameters:,} parameters train, "
            f"{self.frozen_parameters:,} were frozen"
        )

    def print(self) -> None:
        """Show it as a table."""
        from ..reporting import Table

        table = Table(("LP-LoRA", ""))
        table.add("layers frozen", f"{len(self.frozen_layers)} of {self.num_layers}: {_ranges(self.frozen_layers)}")
        table.add("backward stops below", f"{self.decoder_layers}.{self.boundary}")
        table.add("parameters that train", f"{self.trainable_parameters:,}")
        table.add("parameters frozen by this", f"{self.frozen_parameters:,}")
        table.add("adapters removed", self.adapters_removed)
        table.add("embeddings frozen", ", ".join(self.embeddings_frozen) or "none: they did not train")
        table.print()

    def undo(self) -> None:
        """Give the model back as it was before anything of it was frozen; once is enough, more does nothing."""
        self._undo()


def _ranges(indices: tuple[int, ...]) -> str:
    """Runs of indices as ranges.

    >>> _ranges((0, 1, 2, 5))
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
