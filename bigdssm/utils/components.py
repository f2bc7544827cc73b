"""Components that declare their configuration: frozen, torch-free dataclasses, registered by name.

The fields of a component's dataclass are its keys, with type, default and bounds (`utils.bounds.bounded`); the comment
at a field is its line in the reference of keys. Its methods build what it declares and import torch when called.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar, cast, overload

from bigdssm.errors import ConfigError
from bigdssm.utils.bounds import out_of_bounds

MISSING = "???"  # omegaconf's: a key without a default
REGISTRY = "registry"  # in the metadata of a field that is a component
EACH = "each"  # in that of a field that holds components by name
_INTERPOLATION = re.compile(r"(\\*)\$\{")  # with the backslashes before it, which escape it


class Component:
    """The base of components that stand in a config."""

    def check(self, key: str) -> None:
        """Raise ConfigError: values within their bounds that do not go together. `key` names the block."""


def add_named(known: dict[str, Any], name: str, added: Any, noun: str) -> None:
    """Add a class or function to those `known`; one of a module that is loaded again replaces itself.

    Raises ValueError: the name is taken.
    """
    other = known.setdefault(name, added)
    if (other.__module__, other.__qualname__) != (added.__module__, added.__qualname__):
        raise ValueError(f"there is {noun} named {name!r}: {other.__module__}.{other.__qualname__}; rename this one")
    known[name] = added


C = TypeVar("C")
D = TypeVar("D", bound=type)


@dataclass(frozen=True)
class Registry(Generic[C]):
    """The components of one kind by name, and the one validation of a block that names one of them."""

    noun: str  # for messages
    selector: str  # the key that names the component, and the attribute of its class that holds the name
    home: str | None = None  # module that registers the library's own, imported at the first look-up; torch-free
    classes: dict[str, type[C]] = field(default_factory=dict)

    def register(self, cls: D) -> D:
        """Add a component; a class decorator.

        Raises TypeError: no dataclass, or without a name; ValueError: the name is taken.
        """
        name, declared = getattr(cls, self.selector, MISSING), is_dataclass(cls)
        if not declared or name == MISSING:
            raise TypeError(f"{cls.__name__}: {self.noun} is a frozen dataclass with a {self.selector}")
        add_named(self.classes, name, cls, self.noun)
        return cls

    def names(self) -> tuple[str, ...]:
        """Return the names of all components, in the order of their registration."""
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
        """Return the class of the component that a block names, all of whose keys it has.

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

    def read(self, key: str, content: Any) -> C:
        """Return the component of a block whose values are data. Raises ConfigError: `key` names it."""
        cls = self.declaration(key, content)
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        given = {name: literal(value) for name, value in content.items() if name in keys_of(cls)}
        if missing := sorted(OmegaConf.missing_keys(given)):  # which a merge leaves at their defaults
            raise ConfigError(f"{_dotted(key, missing[0])} is missing ('???'); give it a value")
        try:
            made = cast(C, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), given)))
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
    """Return a dataclass field that is one of the registered components, by default that of a name, or none."""
    metadata = {REGISTRY: registry}
    if default is None:
        return cast(C | None, field(default=None, metadata=metadata))
    made: C = field(default_factory=lambda: registry.find(default, "")(), metadata=metadata)
    return made


def components_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Component]]:
    """Yield (dotted key, component) of every component in a config, or in a section of one."""
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        if REGISTRY in f.metadata and value is not None:
            yield key, value
        if is_dataclass(value):
            yield from components_of(value, f"{key}.")


def named_components(registry: Registry[C]) -> dict[str, Any]:
    """Return a dataclass field of components by name, none by default."""
    made: dict[str, Any] = field(default_factory=dict, metadata={EACH: registry})
    return made


def keys_of(cls: Any) -> list[str]:
    """Return the keys of a component, those of its base first."""
    return [f.name for f in fields(cls) if not f.metadata.get("fitted")]


def literal(content: Any) -> Any:
    """Return containers of values that are data: omegaconf interpolates none of their texts."""
    if isinstance(content, dict):
        return {key: literal(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [literal(value) for value in content]
    return _INTERPOLATION.sub(r"\1\1\\${", content) if isinstance(content, str) else content


def first_line(error: Exception) -> str:
    """Return what omegaconf says of a key, without the lines that repeat it."""
    return str(error).splitlines()[0]
