"""What trains the trials of a search: many adapters in one pass, or one after another."""

from .contract import Arrival, Engine, Task

__all__ = ["Arrival", "Engine", "Task"]
