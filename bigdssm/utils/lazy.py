"""Lazy package attributes (PEP 562): importing the package does not import torch."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy_attributes(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package; `modules` maps each module to its public names."""
    homes = {name: module for module, names in modules.items() for name in names}
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = getattr(import_module(homes[name]), name)
        return value

    def names() -> list[str]:
        parts = {name for name, value in namespace.items() if isinstance(value, ModuleType)}  # imported submodules
        return sorted({name for name in namespace if name.startswith("__")} | parts | {*homes})

    return get, names
