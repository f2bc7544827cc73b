"""Components with declared configuration: frozen, torch-free dataclasses, registered by name.

The fields of a component are its config keys, with type, default and bounds (`bounded`); the comment at a field
is its description in the reference of keys. Its methods build the object and import torch when called.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, overload

from bigdssm.errors import ConfigError

Default = TypeVar("Default")
BOUND, RESUME = "bound", "resume"  # in the metadata of a field: its `Bound`, its `ResumeRule`

# Whether a resumed run may change a key. A rule at a section holds for its keys, except those with their own; without
# one, a key must not change.
# may      may change: it does not affect the trained model
# longer   may increase; may have any value in a new segment
# segment  a change starts a new segment over new partitions, if the stream's state permits it
# never    requires another run
ResumeRule = Literal["may", "longer", "segment", "never"]


@dataclass(frozen=True)
class Bound:
    """Limits of a number, or of each number of a tuple."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        """Return whether `number` is within the limits; NaN never is."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        stated = ((f.name.replace("_", " "), getattr(self, f.name)) for f in fields(self))
        return " and ".join(f"{name} {limit:,}" for name, limit in stated if limit is not None)


def bounded(
    default: Default, at_least: float | None = None, at_most: float | None = None, *, above: float | None = None,
    below: float | None = None, resume: ResumeRule | None = None,
) -> Default:  # fmt: skip
    """Return a dataclass field with a default, bounds, and its rule for a resume."""
    metadata: dict[str, Any] = {BOUND: Bound(at_least, above, at_most, below)}
    return field(default=default, metadata=metadata if resume is None else {**metadata, RESUME: resume})


def require(holds: bool, key: str, got: object, needed: str) -> None:
    """Raise ConfigError with the config key, its value and the requirement, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: got {got}, needs {needed}")


def require_all(*rules: tuple[bool, str, object, str]) -> None:
    """Raise ConfigError for the first rule that does not hold; rules are arguments of `require`."""
    for rule in rules:
        require(*rule)


MISSING = "???"  # omegaconf's mark of a key without a default
REGISTRY = "registry"  # metadata key of a field that is a component
EACH = "each"  # metadata key of a field that is a dict of components
TYPE_NAMES = {
    str: "a text", Path: "a path", int: "an integer", float: "a finite number", bool: "true or false", NoneType: "null",
    list: "a list", tuple: "a list", dict: "a mapping",
}  # fmt: skip
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True), **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}  # fmt: skip
_INTERPOLATION = re.compile(r"(\\*)\$\{")  # including the backslashes that escape it
C = TypeVar("C")
D = TypeVar("D", bound=type)


class Component:
    """Base class of components in a config."""

    def check(self, key: str) -> None:
        """Raise ConfigError for an invalid combination of values; `key` names the block."""


def add_named(registered: dict[str, Any], name: str, added: Any, noun: str) -> None:
    """Register a class or function by name; a reloaded module replaces its earlier version.

    Raises ValueError: the name is taken.
    """
    other = registered.setdefault(name, added)
    if (other.__module__, other.__qualname__) != (added.__module__, added.__qualname__):
        raise ValueError(f"there is {noun} named {name!r}: {other.__module__}.{other.__qualname__}; rename this one")
    registered[name] = added


@dataclass(frozen=True)
class Registry(Generic[C]):
    """Components of one kind by name, and validation of the config blocks that select one."""

    noun: str  # for messages
    selector: str  # the config key with the component's name, and the class attribute with the name
    base: type  # the class of all components
    home: str | None = None  # module that registers the built-in components, imported on first use; torch-free
    classes: dict[str, type[C]] = field(default_factory=dict)

    def register(self, cls: D) -> D:
        """Register a component; a class decorator.

        Raises TypeError: another class, or one without a name or a method; ValueError: the name is taken.
        """
        name = getattr(cls, self.selector, MISSING)
        if not is_dataclass(cls) or not issubclass(cls, self.base) or name == MISSING:
            raise TypeError(
                f"{cls.__name__}: {self.noun} is a frozen dataclass, a subclass of {self.base.__name__}, with a "
                f"{self.selector}"
            )
        if missing := [key for key in dir(cls) if getattr(getattr(cls, key, None), "__isabstractmethod__", False)]:
            raise TypeError(f"{cls.__name__} lacks the method {missing[0]} of {self.noun} ({cls.__mro__[1].__name__})")
        add_named(self.classes, name, cls, self.noun)
        return cls

    def names(self) -> tuple[str, ...]:
        """Return the names of all components in registration order."""
        if self.home is not None:
            import_module(self.home)
        return tuple(self.classes)

    def find(self, name: Any, key: str) -> type[C]:
        """Return the class of a component. Raises ConfigError: `key` names the block."""
        names = self.names()
        if name not in names:
            raise ConfigError(
                f"{_dotted(key, self.selector)}: got {name}, needs one of {', '.join(names)}, or {self.noun} whose "
                "module is imported first (docs/extending.md)"
            )
        return self.classes[name]

    def make(self, kind: str | C, options: Mapping[str, Any] | None = None) -> C:
        """Return a component by name with its options, or validate an existing one. Raises ConfigError."""
        if isinstance(kind, str):
            return self.read("", {**(options or {}), self.selector: kind})
        return self.make(getattr(kind, self.selector), asdict(cast(Any, kind)))

    def read(self, key: str, content: Any) -> C:
        """Build the component of a block, without interpolation. Raises ConfigError: `key` names the block."""
        if not isinstance(content, dict):
            example = f"{{{self.selector}: {self.names()[0]}}}"
            raise ConfigError(f"{key}: got {content!r}, needs {self.noun} such as {example}")
        cls = self.find(content.get(self.selector), key)
        # the selector may be a key of the component, too
        options = {name: value for name, value in content.items() if name != self.selector or name in keys_of(cls)}
        return read_fields(cls, key, options, getattr(cls, self.selector))


def _dotted(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else f"{name}"


@overload
def component(registry: Registry[C], default: str) -> C: ...
@overload
def component(registry: Registry[C], default: None) -> C | None: ...
def component(registry: Registry[C], default: str | None) -> C | None:
    """Return a dataclass field for a registered component; `default` is a name, or None for no component."""
    metadata = {REGISTRY: registry}
    if default is None:
        return cast(C | None, field(default=None, metadata=metadata))
    return field(default_factory=lambda: registry.find(default, "")(), metadata=metadata)


def components_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Component]]:
    """Yield (dotted key, component) of every component in a config or a section of one."""
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if REGISTRY in f.metadata and value is not None:
            yield key, value
        if is_dataclass(value):
            yield from components_of(value, f"{key}.")


def named_components(registry: Registry[C], resume: ResumeRule | None = None) -> dict[str, Any]:
    """Return a dataclass field for a dict of components, empty by default."""
    return field(default_factory=dict, metadata={EACH: registry, **({} if resume is None else {RESUME: resume})})


def keys_of(cls: Any) -> list[str]:
    """Return the config keys of a component, those of its base class first."""
    return [f.name for f in fields(cls) if not f.metadata.get("fitted")]


def literal(content: Any) -> Any:
    """Escape `${` in all strings of a container, so that omegaconf does not interpolate them."""
    if isinstance(content, dict):
        return {key: literal(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [literal(value) for value in content]
    if isinstance(content, str):
        return _INTERPOLATION.sub(r"\1\1\\${", content)  # backslashes before `${` doubled, and one more
    return content


def default_of(field: Field[Any]) -> Any:
    """Return the default of a field, MISSING if it is required."""
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    return MISSING if value is NO_DEFAULT else value


def section_of(hint: Any) -> type | None:
    """Return the dataclass of a field that is a (possibly optional) section."""
    inner = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((cls for cls in inner if isinstance(cls, type) and is_dataclass(cls)), None)


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a dataclass and its sections."""
    hints = get_type_hints(cls)
    for f in fields(cast(Any, cls)):
        yield f"{prefix}{f.name}"
        if (section := section_of(hints[f.name])) is not None:
            yield from dotted_keys(section, f"{prefix}{f.name}.")


def read_fields(cls: type[C], key: str, content: Any, title: str = "") -> C:
    """Build a dataclass from plain containers; `key` is its dotted key, `title` its name in messages.

    Raises ConfigError: a key is unknown or missing, or a value has another type or is out of bounds.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{key}: got {content!r:.80}, needs a mapping")
    hints, declared = get_type_hints(cls), keys_of(cls)
    for name in content:
        if name not in declared:
            inner = [dotted for dotted in dotted_keys(cls) if dotted.endswith(f".{name}")]
            near = inner[:3] or difflib.get_close_matches(str(name), declared, 1)
            meant = f"; did you mean {' or '.join(_dotted(key, one) for one in near)}?" if near else ""
            has = f"{title or key or 'the file'} has {', '.join(declared) or 'no keys'}"
            raise ConfigError(f"unknown key {_dotted(key, name)}: {has}{meant}")
    values: dict[str, Any] = {}
    for f in fields(cast(Any, cls)):
        if f.name not in declared or (f.name not in content and default_of(f) != MISSING):
            continue
        dotted, value = _dotted(key, f.name), content.get(f.name, MISSING)
        registry = f.metadata.get(REGISTRY)
        if registry is not None and (value is not None or f.default is not None):  # null as the default: no component
            values[f.name] = registry.read(dotted, value)
        else:
            values[f.name] = read_value(dotted, value, hints[f.name], f.metadata.get(BOUND))
    return cls(**values)


def read_value(key: str, value: Any, hint: Any, bound: Bound | None = None) -> Any:
    """Convert a plain value to its declared type. Raises ConfigError: it has another type or is out of bounds.

    A text may stand for a number or a boolean, as an interpolation such as `${oc.env:SEED}` does, and a number for a
    text or, if whole, for an integer.
    """
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"required key {key} is missing; give it a value")
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    if (section := section_of(hint)) is not None:
        return read_fields(section, key, value)
    exact = [kind for kind in kinds if type(value) is kind]
    for kind in exact or kinds:  # of `int | str`, "5" is a text and no integer
        with suppress(TypeError, ValueError, KeyError, OverflowError):
            return _converted(key, value, kind, bound)
    within = "" if bound is None else f", {bound}"
    needed = [
        f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal
        else TYPE_NAMES[get_origin(kind) or kind] + (within if kind in (int, float) else "")
        for kind in kinds
    ]  # fmt: skip
    raise ConfigError(f"{key}: got {value!r:.80}, needs {' or '.join(needed)}")


def _converted(key: str, value: Any, kind: Any, bound: Bound | None) -> Any:
    """Convert a value to one type.

    Raises TypeError, ValueError, KeyError, OverflowError: another type; ConfigError: out of bounds.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Any:
        return value
    if origin is Literal:
        return inner[inner.index(value)]
    if origin is bool:
        return BOOLEANS[str(value).lower()]
    accepted = {dict: dict, list: list | tuple, tuple: list | tuple, str: str | int | float | os.PathLike}
    if not isinstance(value, accepted.get(origin, str | int | float)):
        raise TypeError
    if origin is dict:
        items = cast(dict[Any, Any], value).items()
        return {read_value(key, name, str): read_value(f"{key}.{name}", one, inner[1]) for name, one in items}
    if origin in (list, tuple):
        elements = inner[:1] * len(value) if origin is list or ... in inner else inner  # tuple[X, ...]
        if len(elements) != len(value):
            raise ConfigError(f"{key}: got {value}, needs {len(elements)} values")
        return origin(
            read_value(f"{key}[{i}]", one, element, bound)
            for i, (one, element) in enumerate(zip(value, elements, strict=True))
        )
    if origin in (str, Path):
        if "\0" in str(value):
            raise ConfigError(f"{key}: got {value!a}, needs text without NUL")
        return origin(value)
    number = origin(value)
    is_truncated = origin is int and isinstance(value, float) and number != value
    if isinstance(value, bool) or is_truncated or not math.isfinite(number):
        raise ValueError
    if bound is not None and not bound.holds(number):
        raise ConfigError(f"{key}: got {value}, needs {bound}")
    return number
