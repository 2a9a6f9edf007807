"""SearchSpace: what a search may vary, in the words of a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ...errors import ConflictError, ForgeError
from ..config.values import FrozenMapping, plain
from .dimensions import Choice, Dimension, Fixed, Range, dimension
from .priors import published_rate

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from ...presets import Preset

RANKS = (4, 8, 16, 32, 64)
DROPOUTS = (0.0, 0.05)
# The QLoRA paper trains with .03, TRL's documented recipes with .03 to .1.
WARMUPS = (0.0, 0.03, 0.1)
# Half a decade to each side of the prior.
DECADE = 10**0.5
HELD, RATIO = "held", "ratio"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OWN = {"freeze_ratio"}
_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search may vary. Each parameter is a list of values, a range, one value, or "auto" for forge's own.

    >>> space = SearchSpace(lora_r=[8, 16], learning_rate={"low": 1e-4, "high": 1e-3, "log": True})
    >>> space.lora_r, SearchSpace.from_dict(space.to_dict()) == space
    ((8, 16), True)
    >>> SearchSpace(lora_r=[0, 8], lora_dropout={"low": 1})
    Traceback (most recent call last):
    forge.errors.ConflictError: SearchSpace: 2 values will not do.
      lora_r=[0, 8]: lora_r=0: it must be a whole number of at least 1.
      lora_dropout={'low': 1}: a range has low and high, and perhaps log and step: {'low': 0.0, 'high': 0.1}.

    Args:
        learning_rate: "auto" is a logarithmic decade around the rate published for the model's width.
        lora_r: ranks.
        alpha: "held" keeps the preset's lora_alpha when the rank changes, "ratio" keeps lora_alpha / lora_r; else
            values of lora_alpha to search.
        lora_dropout: shares.
        warmup_steps: steps, or shares of all steps below 1.
        effective_batch_size: sequences of an optimizer step; "auto" is half the preset's, itself and double.
        target_modules: lists of names of PEFT's, "attention" (q, k, v and o_proj), or "all-linear"; None leaves the
            preset's.
        use_dora: None leaves the preset's.
        use_rslora: None leaves the preset's.
        freeze_ratio: shares of the lowest layers to freeze; None leaves the config's.
        num_train_epochs: None leaves the preset's.
        others: whatever else `get_preset` takes, by its names.

    Raises:
        ConflictError: values that will not do; the message has a line for each.
    """

    learning_rate: Any = _AUTO
    lora_r: Any = RANKS
    alpha: Any = HELD
    lora_dropout: Any = DROPOUTS
    warmup_steps: Any = WARMUPS
    effective_batch_size: Any = _AUTO
    target_modules: Any = None
    use_dora: Any = None
    use_rslora: Any = None
    freeze_ratio: Any = None
    num_train_epochs: Any = None
    others: Mapping[str, Any] = field(default_factory=FrozenMapping)

    def __post_init__(self) -> None:
        problems = [line for name, given in self._given().items() if (line := _problem(name, given))]
        others: Any = self.others
        if not isinstance(others, Mapping):
            problems.append(
                f"others={self.others!r:.60}: it must be a mapping of get_preset's names to what they may be."
            )
        elif twice := sorted({one.name for one in fields(self)} & self.others.keys()):
            problems.append(f"others has {', '.join(twice)}, which SearchSpace has a field for: give it there.")
        if problems:
            count = "1 value" if len(problems) == 1 else f"{len(problems)} values"
            raise ConflictError(f"SearchSpace: {count} will not do.\n" + "\n".join(f"  {line}" for line in problems))
        for one in fields(self):
            value = getattr(self, one.name)
            held = FrozenMapping({k: plain_of(v) for k, v in value.items()}) if one.name == "others" else _held(value)
            object.__setattr__(self, one.name, held)

    def to_dict(self) -> dict[str, Any]:
        """All that differs from the defaults, as JSON knows it."""
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "others":
                if value:
                    found["others"] = plain(value)
            elif value != one.default:
                found[one.name] = plain_of(value)
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchSpace:
        """What `to_dict` gave; names of `get_preset` that are no fields go to `others`.

        Raises:
            ConflictError: values that will not do.
        """
        if not isinstance(values, Mapping):
            raise ConflictError(f"space={values!r:.60}: give a SearchSpace, or a mapping of its fields.")
        known = {one.name for one in fields(cls)}
        own = {name: value for name, value in values.items() if name in known}
        rest = {name: value for name, value in values.items() if name not in known}
        if rest:
            own["others"] = {**own.get("others", {}), **rest}
        return cls(**own)

    def bind(self, preset: Preset) -> BoundSpace:
        """The space for a model's recipe: "auto" becomes numbers.

        Args:
            preset: the recipe; of it the model, the rate and the batch.
        """
        value = {name: choice.value for name, choice in preset.choices.items()}
        own = float(value["learning_rate"])
        # A rate that was asked for says where to look; else the published one does.
        prior = own if preset.choices["learning_rate"].overridden else published_rate(preset) or own
        given = {name: one for name, one in self._given().items() if one is not None and name != "alpha"}
        if given.get("learning_rate") == _AUTO:
            if prior <= 0:
                raise ConflictError(
                    "learning_rate=0: there is no range around it. Give learning_rate a range of its own."
                )
            given["learning_rate"] = Range(prior / DECADE, prior * DECADE, log=True)
        batch = int(value["effective_batch_size"])
        given.setdefault("effective_batch_size", batch)  # None: the preset's; packs need to know it
        if given["effective_batch_size"] == _AUTO:
            given["effective_batch_size"] = sorted({max(1, batch // 2), batch, 2 * batch})
        if "target_modules" in given:
            given["target_modules"] = _named_sets(given["target_modules"])
        dimensions = {name: dimension(one) for name, one in given.items()}
        if self.alpha not in (None, HELD, RATIO):
            dimensions["lora_alpha"] = dimension(self.alpha)
        # Where the rank is not searched, the preset's alpha has the ratio already.
        ratio = value["lora_alpha"] / value["lora_r"] if self.alpha == RATIO and "lora_r" in dimensions else None
        return BoundSpace(dimensions, prior, ratio)

    def _given(self) -> dict[str, Any]:
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "others"}
        return own | (dict(self.others) if isinstance(self.others, Mapping) else {})


@dataclass(frozen=True)
class BoundSpace:
    """A space for one model.

    Args:
        dimensions: by a preset's name, or `freeze_ratio`.
        rate: the learning rate that the default range lies around.
        alpha_ratio: lora_alpha / lora_r where that is kept, else None.
    """

    dimensions: Mapping[str, Dimension]
    rate: float
    alpha_ratio: float | None = None

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna samples."""
        return {name: one.distribution() for name, one in self.dimensions.items() if not isinstance(one, Fixed)}

    def params(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's parameters, in the words of a preset (and `freeze_ratio`).

        Args:
            raw: as Optuna has them.
        """
        found = {
            name: one.only if isinstance(one, Fixed) else one.value(raw[name]) for name, one in self.dimensions.items()
        }
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        if self.alpha_ratio is not None:
            found["lora_alpha"] = max(1, round(self.alpha_ratio * found["lora_r"]))
        return found

    def raw(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The point of the space that lies nearest to some parameters; what they do not name is left to the sampler."""
        found = {}
        for name, one in self.dimensions.items():
            if isinstance(one, Fixed) or name not in params:
                continue
            value = params[name]
            if (raw := one.raw(tuple(value) if isinstance(value, list) else value)) is not None:
                found[name] = raw
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            "dimensions": {name: one.to_dict() for name, one in self.dimensions.items()},
            "alpha_ratio": self.alpha_ratio,
        }


def _named_sets(given: Any) -> Any:
    """`"attention"` as the names that it stands for; a list is of sets to choose from."""
    if isinstance(given, (list, tuple)):
        return tuple(ATTENTION if one == "attention" else one for one in given)
    return Fixed(ATTENTION) if given == "attention" else given


def plain_of(given: Any) -> Any:
    """A dimension as JSON knows it."""
    if isinstance(given, (Choice, Range, Fixed)):
        return given.to_dict()
    if isinstance(given, (list, tuple)):
        return [plain_of(one) for one in given]
    if isinstance(given, Mapping):
        return {name: plain_of(one) for name, one in given.items()}
    if type(given).__name__.endswith("Distribution"):
        return dimension(given).to_dict()
    return given


def _held(value: Any) -> Any:
    """So that nobody can change it, and it can be hashed."""
    found = plain_of(value)
    return FrozenMapping(found) if isinstance(found, dict) else _tuple(found)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(one) for one in value) if isinstance(value, list) else value


def _problem(name: str, given: Any) -> str:
    """A line about what will not do; empty where it does."""
    try:
        _check(name, given)
    except ForgeError as error:
        return f"{name}={plain_of(given)!r:.80}: {error}"
    return ""


def _check(name: str, given: Any) -> None:
    if given is None or (given == _AUTO and name in ("learning_rate", "effective_batch_size")):
        return
    if name == "alpha":
        if given in (HELD, RATIO):
            return
        name = "lora_alpha"
    _check_name(name)
    one = dimension(plain_of(given))
    values = one.values if isinstance(one, Choice) else (one.only,) if isinstance(one, Fixed) else (one.low, one.high)
    for value in values:
        if name == "freeze_ratio":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ConflictError(
                    f"freeze_ratio={value!r}: it must be a share of the layers, at least 0 and below 1."
                )
            continue
        if name == "effective_batch_size" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConflictError(f"effective_batch_size={value!r}: it must be a whole number of at least 1.")
        if name == "target_modules" and not all(isinstance(one, str) for one in _each(value)):
            raise ConflictError(f"target_modules={value!r}: give lists of names, or 'all-linear'.")
        from ...presets.checks import check_values

        check_values({name: list(value) if isinstance(value, tuple) else value})


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_name(name: str) -> None:
    from ...presets.names import canonical

    if name in _OWN:
        return
    if (known := next(iter(canonical({name: None}, frozenset())))) != name:
        raise ConflictError(f"{name!r} is another name of {known}: write {known}.")
