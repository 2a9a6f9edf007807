"""A model card for an adapter, in the hub's format: what it is, how to use it, where it comes from, what it scores.

A card is made to be published, so it says nothing about the machine: of paths it keeps the last part, of addresses what
is no credential. Whatever is handed in stays text; it cannot become Markdown or YAML of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConflictError, UnknownNameError
from .card_metadata import card_metadata
from .charts import write_whole
from .markdown import escaped, literal, one_line, table
from .private import hub_id, last_part

OBJECTIVES = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization",
}
_RESULT_KEYS = ("name", "type", "base", "tuned", "interval", "better")
_DATA_KEYS = ("source", "rows", "tokens", "fingerprint")
_NOT_MEASURED = "not measured"
_ALWAYS_UNMEASURED = "bias, safety and factual correctness"


def model_card(
    *,
    base_model: str,
    objective: str = "sft",
    name: str | None = None,
    adapter_id: str | None = None,
    base_revision: str | None = None,
    license: str | None = None,
    preset: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    intervals: str | None = None,
    environment: Mapping[str, Any] | None = None,
    not_measured: Sequence[str] = (),
    limitations: Sequence[str] = (),
    tags: Sequence[str] = (),
    chat: bool = True,
    own_tokenizer: bool = False,
) -> str:
    """The card as text: a YAML block that the hub reads, and Markdown.

    >>> text = model_card(
    ...     base_model="Qwen/Qwen3-0.6B",
    ...     data={"train": {"source": "/home/ada/train.jsonl", "rows": 500, "fingerprint": "9f2c"}},
    ...     results=[{"name": "Held-out loss", "type": "loss", "base": 2.5, "tuned": 1.75, "better": "lower"}],
    ... )
    >>> "base_model: Qwen/Qwen3-0.6B" in text, "train.jsonl" in text, "/home" in text
    (True, True, False)

    Args:
        base_model: Its hub id, or the folder it was loaded from, of which only the name is told.
        objective: "sft" or "dpo".
        name: What to call the adapter; by default after its base.
        adapter_id: The hub id under which it will be published, for the example; a placeholder stands there if None.
        base_revision: The base's commit on the hub.
        license: As the hub writes it, such as "apache-2.0"; anything else becomes "other" with that name. None: the
            card says that it is not known.
        preset: The preset's name.
        recipe: Every setting: its value, or a tuple of the value and, as text, why it is so.
        data: By part ("train", "validation"): `source` (a hub id or a path, of which only the name is told), `rows`,
            `tokens`, `fingerprint`, each of which may be missing.
        results: One mapping for each metric: `name`, and of `type` (its id on the hub: "loss", "bertscore"), `base` and
            `tuned` (numbers; None: not measured), `interval` (low and high of the difference tuned - base) and `better`
            ("lower" or "higher") those that there are.
        intervals: What the intervals are, such as "95%, paired bootstrap over 64 samples".
        environment: Versions by package, and the hardware.
        not_measured: What else was not measured.
        limitations: Sentences on what the adapter is not good for, or what should be known of the run.
        tags: Beside those that the hub needs.
        chat: Whether the example asks a chat template's question, rather than continuing a text.
        own_tokenizer: Whether the tokenizer was saved with the adapter.

    Returns:
        The text of a README.md.

    Raises:
        ConflictError: No base model, an objective that is none, or a result without a name or with what is no number.
        UnknownNameError: A key of `data` or `results` that is none of these.
    """
    _check(base_model, objective, data or {}, results)
    base = hub_id(base_model)
    called = one_line(name or f"{_named(base_model)}-{objective}-lora")
    data = data or {}
    metadata = card_metadata(
        base=base, objective=objective, name=called, license=license, data=data, results=results, tags=tags
    )
    sections = [
        f"# {escaped(called)}",
        _what_it_is(base_model, base, objective=objective, preset=preset, revision=base_revision, license=license),
        "## How to use it",
        _example(
            base_model,
            base,
            revision=base_revision,
            adapter=adapter_id,
            chat=chat,
            own_tokenizer=own_tokenizer,
        ),
        "## Recipe",
        _recipe(recipe or {}),
        "## Data",
        _data(data),
        "## Results",
        _results(results, intervals),
        "## Environment",
        table(("what", "version"), list((environment or {}).items())) if environment else "Not recorded.",
        "## Limitations",
        _limitations(results, not_measured, limitations, data, license),
    ]
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n"


def write_model_card(folder: str | os.PathLike[str], **described: Any) -> Path:
    """Write the card as README.md, whole or not at all; it replaces the one that PEFT's `save_pretrained` wrote.

    Args:
        folder: The adapter's, which is made where it is missing.
        described: What `model_card` takes.

    Returns:
        The path of the README.md.

    Raises:
        ForgeError: As `model_card`.
    """
    text = model_card(**described)
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    return path


def _check(
    base_model: str, objective: str, data: Mapping[str, Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> None:
    if not isinstance(base_model, str) or not base_model.strip():
        raise ConflictError(f"base_model={base_model!r}: an adapter needs its base. Give a hub id or a folder.")
    if objective not in OBJECTIVES:
        raise UnknownNameError.among("objective", str(objective), OBJECTIVES)
    for part, facts in data.items():
        for key in facts:
            if key not in _DATA_KEYS:
                raise UnknownNameError.among(f"key of data[{part!r}]", str(key), _DATA_KEYS)
    for result in results:
        for key in result:
            if key not in _RESULT_KEYS:
                raise UnknownNameError.among("key of a result", str(key), _RESULT_KEYS)
        if not result.get("name"):
            raise ConflictError(f"{dict(result)!r}: a result needs a name. Give one, such as 'Held-out loss'.")
        interval = result.get("interval")
        numbers = (result.get("base"), result.get("tuned"), *(interval if interval is not None else (None, None)))
        if len(numbers) != 4 or not all(number is None or _is_number(number) for number in numbers):
            raise ConflictError(
                f"{result['name']}: base, tuned and both ends of the interval must be numbers, or None where they were "
                "not measured. Leave out what is not known."
            )


def _what_it_is(
    base_model: str,
    base: str | None,
    *,
    objective: str,
    preset: str | None,
    revision: str | None,
    license: str | None,
) -> str:
    on = f"[{base}](https://huggingface.co/{base})" if base else f"the model {escaped(_named(base_model))}, a local one"
    at = f" (revision {escaped(revision)})" if revision else ""
    how = f", with the preset {escaped(preset)} of transformers-forge" if preset else ", with transformers-forge"
    under = (
        f"Its license is {escaped(license)}."
        if license
        else ("Under which license it may be used is not known; that of the base model applies to the base.")
    )
    return f"A LoRA adapter for {on}{at}, made by {OBJECTIVES[objective]} with TRL{how}. {under}"


def _example(
    base_model: str, base: str | None, *, revision: str | None, adapter: str | None, chat: bool, own_tokenizer: bool
) -> str:
    at = f", revision={literal(one_line(revision))}" if revision and base else ""
    base_at = literal(base or f"path/to/{_named(base_model)}")
    published = hub_id(adapter) if adapter else None
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base_id = {base_at}",
        f"adapter_id = {literal(published or 'path/to/this/adapter')}",
        f'base = AutoModelForCausalLM.from_pretrained(base_id{at}, dtype="auto", device_map="auto")',
        "model = PeftModel.from_pretrained(base, adapter_id).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(adapter_id)"
        if own_tokenizer
        else f"tokenizer = AutoTokenizer.from_pretrained(base_id{at})",
        "",
    ]
    if chat:
        lines += [
            'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        lines += ['inputs = tokenizer("The sky is", return_tensors="pt").to(model.device)']
    lines += [
        "output = model.generate(**inputs, max_new_tokens=128)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return "Not recorded."
    pairs = {name: value if _is_pair(value) else (value, "") for name, value in recipe.items()}
    if any(why for _, why in pairs.values()):
        return table(("setting", "value", "why"), [(name, *pair) for name, pair in pairs.items()])
    return table(("setting", "value"), [(name, value) for name, (value, _) in pairs.items()])


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    if not data:
        return "Not recorded."
    rows = []
    for part, facts in data.items():
        source = facts.get("source")
        rest = (facts.get(key) for key in _DATA_KEYS[1:])
        shown = "not recorded" if not source else hub_id(str(source)) or last_part(str(source)) or "a local folder"
        rows.append((part, shown, *("not recorded" if fact is None else fact for fact in rest)))
    return table(("part", *_DATA_KEYS), rows)


def _results(results: Sequence[Mapping[str, Any]], intervals: str | None) -> str:
    if not results:
        return "Nothing was measured."
    rows = []
    for result in results:
        better = f" ({result['better']} is better)" if result.get("better") else ""
        rows.append((f"{result['name']}{better}", result.get("base"), result.get("tuned"), _difference(result)))
    said = f"\n\nIn brackets: the interval of the difference ({escaped(intervals)})." if intervals else ""
    return table(("metric", "base", "tuned", "difference"), rows, missing=_NOT_MEASURED) + said


def _difference(result: Mapping[str, Any]) -> str:
    base, tuned, interval = result.get("base"), result.get("tuned"), result.get("interval")
    if base is None or tuned is None or not math.isfinite(tuned - base):
        return "-"
    ends = "" if interval is None or None in interval else f" ({interval[0]:+.4g} to {interval[1]:+.4g})"
    return f"{tuned - base:+.4g}{ends}"


def _limitations(
    results: Sequence[Mapping[str, Any]],
    not_measured: Sequence[str],
    limitations: Sequence[str],
    data: Mapping[str, Mapping[str, Any]],
    license: str | None,
) -> str:
    missing = [str(result["name"]) for result in results if result.get("tuned") is None]
    missing = [*dict.fromkeys([*missing, *map(str, not_measured)]), _ALWAYS_UNMEASURED]
    said = [f"Not measured: {'; '.join(map(escaped, missing))}."]
    if results:
        said.append("The results are of the held-out data named above, and of nothing else.")
    if any(part.get("source") and not hub_id(str(part["source"])) for part in data.values()):
        said.append("Data that are not on the hub are told by name and fingerprint only.")
    if not license:
        said.append("No license was given for this adapter.")
    said.append("What is known of the base model's limitations holds for the adapter too.")
    return "\n".join(f"- {sentence}" for sentence in [*said, *map(escaped, limitations)])


def _named(model: str) -> str:
    return one_line(last_part(hub_id(model) or model)) or "model"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
