"""The one renderer: so far, tables on the terminal."""

from __future__ import annotations

from .table import Table

__all__ = ["Table"]
