"""Validation of the arguments of Python functions against their annotations."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from functools import wraps
from inspect import Parameter, signature
from numbers import Real
from operator import index
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from bigdssm.errors import ConfigError

MAX_ERROR_CHARACTERS = 80  # of a text in a message
MAX_CHARS = 60  # characters of a value in a message
TYPE_NAMES = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path", date: "a date",
}  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def checked(function: F) -> F:
    """Validate the arguments of every call against the annotations; a decorator. The call raises ConfigError."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound, hints = form.bind(*args, **kwargs), get_type_hints(function)
        for name in bound.arguments.keys() & hints.keys():
            if form.parameters[name].kind is not Parameter.VAR_KEYWORD:
                bound.arguments[name] = argument(name, bound.arguments[name], hints[name])
        return function(*bound.args, **bound.kwargs)

    form = signature(function)
    return cast(F, call)


def argument(name: str, value: Any, annotation: Any) -> Any:
    """Convert a value to the type of its annotation; NumPy scalars become Python's. Raises ConfigError."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for kind in [] if Path in kinds and isinstance(value, str) and not value else kinds:
        try:
            return _converted(name, value, kind)
        except (TypeError, ValueError):
            continue
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    near = difflib.get_close_matches(str(value).lower(), choices, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if Path in kinds:
        kinds = tuple(kind for kind in kinds if kind is not str)
    words = [_words(kind) for kind in kinds if kind is not NoneType]
    raise ConfigError(f"{name}={short_repr(value)}: needs {' or '.join(words)}{hint}")


def short_repr(value: Any) -> str:
    """Format a value for a message: one line of at most MAX_CHARS characters."""
    text = " ".join(ascii(value).split()) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…"


def _converted(name: str, value: Any, kind: Any) -> Any:
    """Raises TypeError, ValueError: the value has another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return inner[inner.index(value)] if isinstance(value, str) else _refuse()
    if isinstance(value, bool | np.bool_) or kind is bool:
        return bool(value) if kind is bool and isinstance(value, bool | np.bool_) else _refuse()
    if kind is int:
        return index(value)
    if kind is float:
        return float(value) if isinstance(value, Real) else _refuse()
    if kind in (str, Path):
        if not isinstance(value, str if kind is str else (str, os.PathLike)):
            _refuse()
        text = os.fspath(value)
        text.encode()  # ValueError: an unpaired surrogate
        if "\0" in text or (kind is Path and not text):
            _refuse()
        return kind(text)
    if kind is date and isinstance(value, np.datetime64):
        value = value.astype("datetime64[us]").item()
    if origin is not None and issubclass(origin, Callable):  # type: ignore[arg-type]
        return value if callable(value) else _refuse()
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            _refuse()
        return {argument(name, key, inner[0]): argument(f"{name}[{key!r}]", v, inner[1]) for key, v in value.items()}
    if origin is not None:  # a sequence
        if isinstance(value, str | bytes | Mapping):
            _refuse()
        return [argument(f"{name}[{i}]", element, inner[0]) for i, element in enumerate(value)]
    return value if isinstance(value, kind) else _refuse()


def _refuse() -> Any:
    raise TypeError


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    origin = get_origin(kind)
    if origin is None:
        return TYPE_NAMES.get(kind) or f"a {kind.__name__}"
    if issubclass(origin, Callable):  # type: ignore[arg-type]
        return "a function"
    return f"a {'dict' if issubclass(origin, Mapping) else 'list'}, each element {_words(get_args(kind)[-1])}"


def check_utf8(texts: Iterable[str]) -> None:
    """Raise ConfigError if a text holds a lone surrogate (JSON's "\\ud800"), which UTF-8 cannot encode."""
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{ascii(text)[:MAX_ERROR_CHARACTERS]} is not valid UTF-8")
