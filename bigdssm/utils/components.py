"""Components with declared configuration: frozen, torch-free dataclasses, registered by name.

The fields of a component are its config keys, with type, default and bounds (`utils.bounds.bounded`); the comment at a
field is its description in the reference of keys. Its methods build the object and import torch when called.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar, cast, get_args, overload

from bigdssm.errors import ConfigError
from bigdssm.utils.bounds import RESUME, ResumeRule, out_of_bounds

MISSING = "???"  # omegaconf's mark of a key without a default
REGISTRY = "registry"  # metadata key of a field that is a component
EACH = "each"  # metadata key of a field that is a dict of components
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
        name, declared = getattr(cls, self.selector, MISSING), is_dataclass(cls) and issubclass(cls, self.base)
        if not declared or name == MISSING:
            noun = f"{self.noun} is a frozen dataclass, a subclass of {self.base.__name__}, with a {self.selector}"
            raise TypeError(f"{cls.__name__}: {noun}")
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

    def declaration(self, key: str, content: Any, default: str | None = None) -> type[C]:
        """Return the class of the component that a block selects, after validating the block's keys.

        Raises ConfigError: `key` names the block.
        """
        if not isinstance(content, dict):
            example = f"{{{self.selector}: {self.names()[0]}}}"
            raise ConfigError(f"{key}: got {content!r}, needs {self.noun} such as {example}")
        cls = self.find(content.get(self.selector, default), key)
        declared = keys_of(cls)
        for name in content:
            if name not in (*declared, self.selector):
                near = difflib.get_close_matches(str(name), declared, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                has = ", ".join(declared) or "no keys"
                raise ConfigError(f"unknown key {_dotted(key, name)}: {getattr(cls, self.selector)} has {has}{meant}")
        return cls

    def make(self, kind: str | C, options: Mapping[str, Any] | None = None) -> C:
        """Return a component by name with its options, or validate an existing one. Raises ConfigError."""
        if isinstance(kind, str):
            return self.read("", {**(options or {}), self.selector: kind})
        return self.make(getattr(kind, self.selector), asdict(cast(Any, kind)))

    def read(self, key: str, content: Any) -> C:
        """Build the component of a block, without interpolation. Raises ConfigError: `key` names the block."""
        cls = self.declaration(key, content)
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        given = {name: literal(value) for name, value in content.items() if name in keys_of(cls)}
        if missing := sorted(OmegaConf.missing_keys(given)):  # a merge would replace them with defaults
            raise ConfigError(f"{_dotted(key, missing[0])} is missing ('???'); give it a value")
        try:
            schema, values = OmegaConf.structured(cls), OmegaConf.create(given)
            convert_whole_numbers(schema, values)
            made = cast(C, OmegaConf.to_object(OmegaConf.merge(schema, values)))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{_dotted(key, error.full_key)}: {first_line(error)}") from None
        for name, got, needed in out_of_bounds(made, key):
            raise ConfigError(f"{name}: got {got}, needs {needed}")
        return made


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
    return _INTERPOLATION.sub(r"\1\1\\${", content) if isinstance(content, str) else content


def convert_whole_numbers(schema: Any, given: Any) -> None:
    """Convert floats such as 1.0 in `given` where `schema` has integers, as JSON Schema accepts them."""
    from omegaconf import DictConfig, IntegerNode, ListConfig

    for key in [] if given._is_none() or given._is_interpolation() else given.keys():
        declared, node = schema._get_node(key, validate_access=False), given._get_node(key)
        if isinstance(declared, DictConfig) and isinstance(node, DictConfig):
            convert_whole_numbers(declared, node)
        elif isinstance(declared, IntegerNode):
            given[key] = _whole(node._value())
        elif isinstance(node, ListConfig) and _element_type(declared) is int:
            given[key] = [_whole(one) for one in node]


def _element_type(declared: Any) -> Any:
    """Return the type of a list's elements; None for other nodes."""
    inner = get_args(getattr(getattr(declared, "_metadata", None), "ref_type", None))
    return inner[0] if inner else None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def first_line(error: Exception) -> str:
    """Return the first line of an omegaconf error; the others repeat the key."""
    return str(error).splitlines()[0]
