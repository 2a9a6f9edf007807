"""Recipes that produce real Hugging Face config objects.

preset.py      the Preset and get_preset: what users touch
method.py      what a name and the overrides come down to: objective, adapters or all weights, precision
recipes.py     the values, each with its reason and source
batch.py       micro-batch x accumulation x world size
names.py       which names exist, and which object each belongs to
checks.py      bad values and contradictions                (targets.py: LoRA targets against the model)
resolve.py     name + overrides -> table of choices        (choice.py: one entry of it)
build.py       table of choices -> real objects
explain.py     one value's reasons, and the table of all   (defaults.py: what is so when a preset says nothing)
difference.py  two recipes side by side
file.py        a preset as JSON
fp32.py        the callback that keeps trainable parameters in fp32
"""

from __future__ import annotations

from .preset import Preset, get_preset, list_presets

__all__ = ["Preset", "get_preset", "list_presets"]
