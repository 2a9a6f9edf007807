"""One value of a preset, with the reason for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Choice:
    """A value that a preset carries and where it comes from.

    Args:
        value: what the Hugging Face object gets; dtypes by name, so that a preset can be written as JSON.
        reason: why this value, in a sentence.
        source: the paper, documentation or measurement behind it; empty for the user's own values.
        hardware_rule: how the hardware profile decided it; empty where it did not.
        overridden: whether the user set it.
    """

    value: Any
    reason: str
    source: str = ""
    hardware_rule: str = ""
    overridden: bool = False

    def set_by_user(self, value: Any) -> Choice:
        """This choice with the user's value in its place; the reason keeps what the recipe would have taken."""
        if value == self.value:
            return replace(self, reason=f"set by you; {self.reason}", overridden=True)
        return Choice(value, f"set by you; the recipe has {self.value!r}: {self.reason}", overridden=True)

    def __str__(self) -> str:
        lines = [f"{self.value!r}", f"why: {self.reason}"]
        if self.source:
            lines.append(f"source: {self.source}")
        if self.hardware_rule:
            lines.append(f"hardware: {self.hardware_rule}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation(Choice):
    """What `Preset.explain` returns: a choice that knows its name and prints itself in full."""

    name: str = ""

    def __str__(self) -> str:
        return f"{self.name} = {super().__str__()}"

    # In a notebook or a shell, people type preset.explain("lora_alpha") and expect to read the answer.
    __repr__ = __str__
