"""A config's fields as a YAML or JSON file.

PyYAML reads version 1.1 of YAML, in which `1e-4` is text, `no` is False, `010` is 8 and `1:30` is 90. Here only what
JSON too takes for a number is one. `on`, `off`, `yes` and `no` stay words until it is known which field they are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import ConflictError, ForgeError
from .found import Found
from .rules import RULES, unknown_field

SUFFIXES = (".yaml", ".yml", ".json")
_WORDS = {"on": True, "yes": True, "off": False, "no": False}
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_RESOLVED = (
    ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]{,99})$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("!word", re.compile(r"(on|On|ON|off|Off|OFF|yes|Yes|YES|no|No|NO)$"), list("oOyYnN")),
)


class Word(str):
    """A word that was not quoted and that YAML 1.1 takes for a boolean."""

    __slots__ = ()


def read_fields(path: Path, *, skip: Collection[str] = ()) -> Found:
    """The fields that a file holds.

    Args:
        path: Of the file.
        skip: Fields that something else decides.

    Raises:
        ForgeError: There is no such file, or it cannot be read.
    """
    _check_suffix(path)
    path = path.expanduser()
    if not path.is_file():
        raise ForgeError(f"There is no file {str(path)!r} (looked for {path.absolute()}). Correct the path.")
    raw = path.read_bytes()
    parsed = parse_json(raw, str(path)) if path.suffix.lower() == ".json" else _parse_yaml(raw, str(path))
    if not isinstance(parsed, dict):
        held = "nothing" if parsed is None else f"a {type(parsed).__name__}"
        raise ForgeError(f"{path} holds {held}, where a mapping of fields belongs. Write 'n_trials: 20', say.")
    found = Found(f"TuningConfig from {path}")
    for name, value in parsed.items():
        if name not in RULES:
            found.problems.append(f"{name}: {unknown_field(name)}")
        elif name not in skip:
            found.given.add(name)
            found.values[name] = _without_words(name, value, found.problems)
    return found


def write_fields(path: Path, values: dict[str, Any]) -> Path:
    """Write fields to a file, whole or not at all.

    Raises:
        ForgeError: The path ends in none of the suffixes.
    """
    from ...reporting.charts import write_whole

    _check_suffix(path)
    path = path.expanduser()
    if path.suffix.lower() == ".json":
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    else:
        import yaml

        text = yaml.dump(values, Dumper=_yaml()[1], sort_keys=False, allow_unicode=True, default_flow_style=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
    return path


def parse_json(text: str | bytes, what: str) -> Any:
    """What JSON text holds; a key that is there twice is refused.

    Args:
        text: The JSON.
        what: What errors call it.

    Raises:
        ForgeError: It is no JSON; the message names the line.
    """
    try:
        return json.loads(_decoded(text, what), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ForgeError(
            f"{what}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}. Correct the line."
        ) from None
    except RecursionError:
        raise ForgeError(f"{what} is nested too deeply to be read. Write it flat.") from None
    except _Twice as error:
        raise ConflictError(f"{what} has the key {str(error)!r} twice. Leave one of them out.") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ForgeError(f"{what}: {error}. Write a shorter one.") from None


def _parse_yaml(raw: bytes, what: str) -> Any:
    import yaml

    text = _decoded(raw, what)
    try:
        return yaml.load(text, Loader=_yaml()[0])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ForgeError(f"{what}{where}: {error.problem or error.context}. Correct the line.") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ForgeError(
            f"{what}, line {number}: a character that YAML does not allow ({error.character!r}). Remove it."
        ) from None
    except RecursionError:
        raise ForgeError(f"{what} is nested too deeply to be read. Write it flat.") from None


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ForgeError(f"{path}: a config is a {', '.join(SUFFIXES)} file. Rename it after what it holds.")


def _decoded(text: str | bytes, what: str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = text.count(b"\n", 0, error.start) + 1
        raise ForgeError(
            f"{what}, line {number}: byte 0x{text[error.start]:02x} is not UTF-8. Save it as UTF-8."
        ) from None


class _Twice(Exception):  # noqa: N818  (never reaches a user)
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def _without_words(name: str, value: Any, problems: list[str], place: str = "") -> Any:
    """The value with words as what they mean there: text, or True and False."""
    place = place or name
    if isinstance(value, Word):
        if place == name and RULES[name].words:
            return _WORDS[value.lower()]
        if place != name and not place.endswith("_strategy']"):
            problems.append(
                f"{place}={value}: YAML's versions differ on whether this is text. Write true or false, or quote it."
            )
        return str(value)
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, held in value.items():
            before = len(problems)
            own = _without_words(name, held, problems, f"{place}[{str(key)!r}]")
            if len(problems) == before:  # one line about a value is enough
                found[str(key)] = own
        return found
    if isinstance(value, list) and place != name:
        return [_without_words(name, held, problems, f"{place}[{at}]") for at, held in enumerate(value)]
    return value


@lru_cache(maxsize=1)
def _yaml() -> tuple[Any, Any]:
    """PyYAML's loader and dumper, with the scalars of YAML 1.2; made when they are needed, for PyYAML is."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(
                    None, None, "aliases (*name) are not read in a config", self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names: set[Any] = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str):
                    raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is no text", key.start_mark)
                if name in names:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} again", key.start_mark)
                names.add(name)
            found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return found

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Quotes what either version of YAML would take for something else than text."""

    for tag, pattern, first in _RESOLVED:
        Loader.add_implicit_resolver(tag, pattern, first)
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    Loader.add_constructor("!word", _word)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", _float)
    return Loader, Dumper


def _word(loader: Any, node: Any) -> str:
    text = str(loader.construct_scalar(node))
    return Word(text) if text.lower() in _WORDS else text  # anyone may write "!word maybe"


def _float(loader: Any, node: Any) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))
