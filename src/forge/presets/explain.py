"""Every value answers for itself: the sentence for one name, and the table of all."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import UnknownNameError
from ..reporting import Table
from .choice import Explanation
from .defaults import default_of
from .method import PRESETS
from .names import ALIASES, OWN_NAMES, TRAINING_OBJECTS, canonical, fields_by_object, owners

if TYPE_CHECKING:
    from .preset import Preset

_SECTIONS = ("model", "quantisation", "adapter", "training")


def explain(preset: Preset, name: str) -> Explanation:
    """The explanation of `name` in `preset`; see `Preset.explain`."""
    name = ALIASES.get(name, name)
    other = "sft" if preset.objective == "dpo" else "dpo"
    if name in preset.choices:
        choice = preset.choices[name]
        there = preset.tables[other].get(name)
        reason = choice.reason
        if there and there.value != choice.value:
            reason += f" (in get_{other}_config() it is {there.value!r}: {there.reason})"
        return Explanation(**{**asdict(choice), "reason": reason}, name=name)
    if name in preset.tables[other]:
        there = preset.tables[other][name]
        return Explanation(there.value, f"in get_{other}_config() only: {there.reason}", there.source, name=name)
    return _left_alone(preset, name)


def _left_alone(preset: Preset, name: str) -> Explanation:
    canonical({name: None}, frozenset())  # raises for names that nothing has
    found = owners(name)
    if name in OWN_NAMES or not found:
        raise UnknownNameError.among("setting", name, preset.choices)
    if found == ("LoraConfig",) and not preset.choices["use_peft"].value:
        return Explanation(None, "all weights are trained: there is no adapter", name=name)
    if found == ("BitsAndBytesConfig",) and preset.get_bnb_config() is None:
        return Explanation(None, "the base is not quantised", name=name)
    own, other = ("DPOConfig", "SFTConfig") if preset.objective == "dpo" else ("SFTConfig", "DPOConfig")
    owner = next((kind for kind in (own, other) if kind in found), found[0])
    where = f", in {owner} only" if owner == other else ""
    return Explanation(
        default_of(owner, name), f"the default of {owner}, which the recipe leaves alone{where}", name=name
    )


def print_info(preset: Preset) -> None:
    """Print the whole recipe; see `Preset.print_info`."""
    table = Table(("name", "value", "why", "source"), title=_title(preset))
    sources: dict[str, int] = {}
    for section in _SECTIONS:
        rows = [(name, c) for name, c in preset.choices.items() if _section(name) == section]
        if rows:
            table.section(section)
        for name, choice in rows:
            # Sources are long and recur: the table carries a number, the footer the text.
            number = f"[{sources.setdefault(choice.source, len(sources) + 1)}]" if choice.source else ""
            table.add(
                name,
                f"{_short(choice.value)} (yours)" if choice.overridden else _short(choice.value),
                choice.reason,
                number,
            )
    table.footer = "\n".join(
        [f"hardware {preset.hardware.name}: {preset.hardware.rule}", *(f"[{n}] {s}" for s, n in sources.items())]
    )
    table.print()


def _short(value: Any) -> Any:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return f"{text[:57]}..." if isinstance(text, str) and len(text) > 120 else text


def _title(preset: Preset) -> str:
    anatomy = preset.anatomy
    model = (
        f"{anatomy.name_or_path or anatomy.model_type}, {anatomy.num_parameters / 1e9:.3g}B parameters"
        if anatomy
        else f"no model given{': LoRA targets by pattern' if preset.choices['use_peft'].value else ''}"
    )
    return f"{preset.name}: {PRESETS[preset.name]}\n{model}; hardware {preset.hardware.name}"


def _section(name: str) -> str:
    known = fields_by_object()
    if name in ("precision", "use_peft") or name in known["from_pretrained"]:
        return "model"
    if name in known["BitsAndBytesConfig"]:
        return "quantisation"
    if name in known["LoraConfig"] and not any(name in known[kind] for kind in TRAINING_OBJECTS):
        return "adapter"
    return "training"
