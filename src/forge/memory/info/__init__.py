"""What a model is made of, as a table: `print_model_info`.

model.py    ModelInfo, from a live model, a config or an id
pieces.py   each parameter, buffer and quantisation constant once, with its place
parts.py    sums over them
table.py    the two tables
"""

from __future__ import annotations

from .model import ModelInfo, print_model_info
from .parts import Part, Quantized

__all__ = ["ModelInfo", "Part", "Quantized", "print_model_info"]
