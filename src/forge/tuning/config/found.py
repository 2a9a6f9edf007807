"""What a file, the environment or a request says about a config's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .rules import line, read


@dataclass(frozen=True)
class Found:
    """What one source says.

    Args:
        source: What an error begins with.
        values: By field.
        labels: What the source calls these fields.
        problems: A line for each value that will not do.
        given: The fields that the source speaks of, wrong values included.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)

    def before(self, rest: Found) -> Found:
        """Both, of which this one goes first."""
        return Found(
            self.source,
            {**rest.values, **self.values},
            {**rest.labels, **self.labels},
            [*self.problems, *rest.problems],
            self.given | rest.given,
        )

    def add(self, name: str, label: str, value: Any, *, written: Any = None) -> None:
        """Take a field's value, or the line that says why it will not do.

        Args:
            name: The field.
            label: What the source calls it.
            value: Its value.
            written: The value as the source has it, where that differs.
        """
        self.given.add(name)
        own, why = read(name, value)
        if why:
            self.problems.append(line(label, value if written is None else written, why))
        else:
            self.values[name], self.labels[name] = own, label
