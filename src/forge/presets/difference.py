"""Where two recipes differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..reporting import Table
from .choice import Choice
from .defaults import default_of
from .names import owners


@dataclass(frozen=True)
class PresetDiff:
    """The values in which two recipes differ; prints as a table.

    Args:
        left: name of the first.
        right: name of the second.
        rows: (name, value in the first, value in the second, why the first has it).
    """

    left: str
    right: str
    rows: tuple[tuple[str, Any, Any, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What differs, by name."""
        return tuple(row[0] for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return f"{self.left} and {self.right} do not differ"
        table = Table(("name", self.left, self.right, f"why, in {self.left}"))
        for name, left, right, why in self.rows:
            table.add(name, left, right, why)
        return str(table)

    __repr__ = __str__


def diff_tables(left: str, mine: Mapping[str, Choice], right: str, theirs: Mapping[str, Choice]) -> PresetDiff:
    """The rows of two tables of choices in which the values differ; what one of them lacks is "-"."""
    absent = Choice("-", "not part of this recipe")
    rows = []
    for name in dict.fromkeys([*mine, *theirs]):
        a, b = mine.get(name, absent), theirs.get(name, absent)
        if a.value != b.value:
            rows.append((name, a.value, b.value, a.reason))
    return PresetDiff(left, right if right != left else f"the other {right}", tuple(rows))


def trl_defaults(objective: str, mine: Mapping[str, Choice]) -> dict[str, Choice]:
    """What `SFTTrainer("id", peft_config=LoraConfig())` would do about the same names, as installed."""
    kind = "DPOConfig" if objective == "dpo" else "SFTConfig"
    found: dict[str, Any] = {}
    for name in mine:
        owner = next((owner for owner in (kind, "LoraConfig") if owner in owners(name)), None)
        if owner:
            found[name] = default_of(owner, name)
    world_size = mine["world_size"].value
    found |= {
        "dtype": "float32",  # TRL loads a checkpoint in fp32, whatever it was saved in
        "bf16": True,  # SFTConfig and DPOConfig turn None into this
        "world_size": world_size,
        "effective_batch_size": found["per_device_train_batch_size"] * world_size,
    }
    if "target_modules" in found:
        found["target_modules"] = "PEFT's own list: q and v for most families"
    return {name: Choice(value, "TRL's default") for name, value in found.items() if name in mine}
