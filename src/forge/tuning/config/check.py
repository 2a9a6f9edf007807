"""All that is wrong with the values of a config, said at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConflictError, ForgeError
from .rules import MERGED, RULES, line, read
from .values import FrozenMapping, frozen, plain, shown


def check(values: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The values as a config keeps them, and a line for each that will not do.

    Args:
        values: By field.
        labels: What to call a field whose value came from elsewhere, such as "LORA_N_TRIALS".
    """
    labels = labels or {}
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        own, why = read(name, value)
        if why:
            problems.append(line(labels.get(name, name), value, why))
        else:
            kept[name] = own
    if isinstance(values.get("overrides"), Mapping):
        kept["overrides"], wrong = _checked_overrides(values["overrides"], kept)
        problems += wrong
    adapted = kept.get("overrides", {})
    if kept.get("prefix_cache") and kept.get("freeze_ratio") == 0 and "layers_to_transform" not in adapted:
        why = "with freeze_ratio=0.0 no layer is frozen, so there is nothing to cache. Set freeze_ratio=0.5, say."
        problems.append(line(labels.get("prefix_cache", "prefix_cache"), values["prefix_cache"], why))
    return kept, problems


def raise_if_any(problems: list[str], what: str = "TuningConfig") -> None:
    """Raise one error with all of them.

    Raises:
        ConflictError: There are some.
    """
    if problems:
        count = "1 value" if len(problems) == 1 else f"{len(problems)} values"
        raise ConflictError(f"{what}: {count} will not do.\n" + "\n".join(f"  {problem}" for problem in problems))


def _checked_overrides(overrides: Mapping[Any, Any], kept: Mapping[str, Any]) -> tuple[FrozenMapping, list[str]]:
    """The overrides under a preset's names, and a line for each that get_preset or a tuner would not take."""
    if not overrides:
        return FrozenMapping(), []
    found: dict[str, Any] = {}
    problems = []
    for typed, value in overrides.items():
        label = f"overrides[{typed!r}]"
        try:
            name, own = _override(typed, value)
            if name in found and found[name] != own:
                why = f"{name} is given twice, as {shown(found[name])} and {shown(own)}. Leave one of them out."
                raise ConflictError(why)
            field = kept.get(name) if name in MERGED else None
            if field is not None and field != own:
                why = f"{name}={field!r} is given too. Leave one of them out."
                raise ConflictError(why)
            found[name] = own
        except ForgeError as error:
            problems.append(f"{label}: {error}" if typed == "hub_token" else line(label, value, str(error)))
    return FrozenMapping(found), problems


def _override(typed: Any, value: Any) -> tuple[str, Any]:
    """The name and value under which a preset knows this override."""
    from ...presets.checks import check_values
    from ...presets.names import canonical

    if not isinstance(typed, str):
        raise ForgeError("it must be a name of get_preset's, as text.")
    if typed == "hub_token":
        raise ForgeError("a run's folder must hold no secret. Set HF_TOKEN in the environment instead.")
    if typed == "model":
        raise ForgeError("the model is a field of its own. Set model_name.")
    if typed in RULES and typed not in MERGED:
        raise ForgeError(f"this is a field of its own. Set {typed} beside overrides, not in it.")
    ((name, named),) = canonical({typed: value}, frozenset()).items()
    try:
        own = frozen(named)
    except TypeError as error:
        raise ForgeError(f"it must be a value that JSON holds, and {error}. Give it as text or numbers.") from None
    check_values({name: plain(own)})
    if name in MERGED and own is not None:
        own, why = read(name, own)
        if why:
            raise ForgeError(why)
    if name == "use_peft" and own is False:
        raise ForgeError("all weights would be trained, and a tuner makes adapters. Leave it out.")
    return name, own
