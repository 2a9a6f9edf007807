"""The one renderer: tables on the terminal, charts as PNG, pages as HTML that needs nothing beside it."""

from __future__ import annotations

from .charts import Chart, Series
from .page import Page
from .table import Table

__all__ = ["Chart", "Page", "Series", "Table"]
