"""Read YAML files and `key=value` overrides into a Config or another dataclass, and compare two configs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import Container, DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from bigdssm.config.checks import check_config
from bigdssm.config.keys import Config
from bigdssm.errors import ConfigError
from bigdssm.utils.arguments import checked
from bigdssm.utils.components import EACH, REGISTRY, convert_whole_numbers, first_line, keys_of, literal

NO_VALUE = yaml.YAMLError, OmegaConfBaseException, RecursionError  # of an override
Kind = TypeVar("Kind")


@checked
def config_of(config: Config | str | Path, overrides: Sequence[str] = ()) -> Config:
    """Validate a Config, or load it from a YAML file with `overrides`. Raises ConfigError."""
    if not isinstance(config, Config):
        return load_config(config, overrides)
    if overrides:
        raise ConfigError("key=value overrides apply to a config file; change a Config with dataclasses.replace")
    try:
        content = config.to_dict()
    except TypeError as error:
        raise ConfigError(f"Config: {error}; needs the types of its fields") from None
    return config_from(Path("Config"), content)


def config_from(source: Path, *contents: Any) -> Config:
    """Return the validated Config of plain containers, later ones over earlier. Raises ConfigError with `source`."""
    config = to_dataclass(source, Config, *contents)
    check_config(config)
    return config


@checked
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated Config of the YAML file `path` with `key=value` overrides (dotted keys, YAML values).

    Raises ConfigError: missing file, invalid YAML, unknown or missing keys, wrong types, or conflicting values.
    """
    config = read_config(path, overrides)
    check_config(config)
    return config


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a Config without validating it as a whole. Raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; --config takes a YAML file such as those in configs/")
    content = read_yaml(path, "the sections run, data, model, …")
    return to_dataclass(path, Config, content, changes_of(overrides, Config, content))


def load_written_config(path: Path) -> Config:
    """Return the validated Config of a YAML file written by a stage, without interpolation of `${…}`.

    Raises ConfigError as `load_config` does.
    """
    return config_from(path, literal(OmegaConf.to_container(read_yaml(path, "the sections run, data, model, …"))))


def options_of(overrides: Sequence[str], kind: type) -> dict[str, Any]:
    """Return the `key=value` options of a component of the class `kind`. Raises ConfigError."""
    return cast(dict[str, Any], OmegaConf.to_container(changes_of(overrides, kind, OmegaConf.create({}))))


def changes_of(overrides: Sequence[str], kind: type, content: DictConfig) -> DictConfig:
    """Return `key=value` overrides of a file's `content` as a container; `kind` is its dataclass. Raises ConfigError.

    The value of a field of type str is the rest of the word, unless it is empty, null or in quotes; others are YAML
    without comments.
    """
    changes, given = OmegaConf.create({}), [content]
    for override in overrides:
        if not re.match(r"\w[^\[\]=]*(\[\d+\][^\[\]=]*)*=", override):
            raise ConfigError(f"override {override!r} is not of the form key=value, for example pretrain.steps=100")
        with suppress(*NO_VALUE):
            given.append(OmegaConf.from_dotlist([override]))
    for override in overrides:
        key, _, value = override.partition("=")
        is_yaml = value.strip()[:1] in "'\"" or value.strip().lower() in ("null", "~", "???")
        try:
            if is_yaml or not _is_text(kind, key, given):
                _check_value(override, value)
                changes.merge_with_dotlist([override])
            else:
                OmegaConf.update(changes, key, value)
        except NO_VALUE as error:
            raise ConfigError(f"override {override!r} has no YAML value: {' '.join(str(error).split())}") from None
    return changes


def _check_value(override: str, value: str) -> None:
    """Raise ConfigError for a YAML value with a comment or ???; YAMLError: no YAML."""
    tokens = list(yaml.scan(value, yaml.SafeLoader))
    if any("#" in value[before.end_mark.index : after.start_mark.index] for before, after in pairwise(tokens)):
        raise ConfigError(f"override {override!r}: a # after a space begins a comment; quote a text that contains one")
    if any(getattr(token, "value", None) == "???" for token in tokens):
        raise ConfigError(f"override {override!r}: ??? marks a value that an override replaces; give the value")


def read_yaml(path: Path, needs: str) -> DictConfig:
    """Return the mapping in a YAML file. Raises ConfigError: the file is missing, invalid, or not a mapping.

    `needs` describes the expected content in messages.
    """
    try:
        content: DictConfig | ListConfig = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {' '.join(str(error).split())}") from None
    except OSError as error:  # omegaconf also raises OSError for a file with a single scalar
        raise ConfigError(f"{path} cannot be read, needs {needs}: {error.strerror or error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'key'}: {first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} contains a list, needs {needs}")
    return content


def to_dataclass(path: Path, kind: type[Kind], *contents: Any) -> Kind:
    """Merge `contents`, later ones over earlier, into the dataclass `kind`. Raises ConfigError that names the key."""
    try:
        schema = OmegaConf.structured(kind)
        given: Any = OmegaConf.create({})
        for content in contents:
            later = OmegaConf.create(content)
            _replace_components(kind, given, later)
            _check_lists(path, given, later)
            given = OmegaConf.merge(given, later)
        _name_components(path, schema, kind, given)
        _check_lists(path, schema, given)
        convert_whole_numbers(schema, given)
        merged = OmegaConf.merge(schema, given)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{path}: required key {missing[0]} is missing; give it a value")
        return cast(Kind, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        reason = first_line(error).partition(". Did you mean")[0]  # omegaconf's own hint omits the section
        hint = _similar_keys(str(error.full_key), kind)
        raise ConfigError(f"{path}: unknown key {error.full_key}: {reason}{hint}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or kind.__name__.lower()}: {first_line(error)}") from None


def _check_lists(path: Path, given: Any, later: Any, prefix: str = "") -> None:
    """Raise ConfigError for a mapping over a list, a list over a mapping, and a container among texts.

    OmegaConf's TypeError names no key, and it accepts containers in a list of texts.
    """
    for key in later:
        before, block = given._get_node(key, validate_access=False), later._get_node(key)
        if not isinstance(block, Container):
            continue
        if block._is_none() or block._is_interpolation() or not isinstance(before, Container):
            continue
        name, is_list = f"{prefix}{key}", not isinstance(block, DictConfig)
        if is_list != (not isinstance(before, DictConfig)):
            got, needed = ("list", "mapping") if is_list else ("mapping", "list")
            raise ConfigError(f"{path}: {name}: got a {got}, needs a {needed}")
        if is_list and get_args(before._metadata.ref_type)[:1] == (str,):
            for i, value in enumerate(block):
                if isinstance(value, Container):
                    raise ConfigError(f"{path}: {name}[{i}]: got {value}, needs a text")
        elif not is_list and not before._is_none():
            _check_lists(path, before, block, f"{name}.")


def _replace_components(kind: Any, given: Any, later: Any) -> None:
    """Remove keys of `given` that are invalid for the components which `later` selects by name."""
    if not isinstance(given, DictConfig) or not isinstance(later, DictConfig) or given._is_none() or later._is_none():
        return
    hints = get_type_hints(kind)
    for f in fields(kind):
        before, block = given._get_node(f.name), later._get_node(f.name)
        registry = f.metadata.get(REGISTRY)
        if registry is None:
            if (section := _section(hints[f.name])) is not None:
                _replace_components(section, before, block)
        elif isinstance(before, DictConfig) and isinstance(block, DictConfig) and not before._is_none():
            name = None if block._is_none() else block.get(registry.selector)
            if name in registry.names() and name != before.get(registry.selector):
                valid = {*keys_of(registry.find(name, "")), registry.selector}
                for key in [key for key in before if key not in valid]:
                    del before[key]


def _name_components(path: Path, schema: DictConfig, kind: Any, given: Any, prefix: str = "") -> None:
    """Declare in `schema` the components named in `given`. Raises ConfigError: one is unknown or invalid."""
    if not isinstance(given, DictConfig) or given._is_interpolation() or given._is_none():
        return
    hints = get_type_hints(kind)
    for f in fields(kind):
        key, block, registry = f"{prefix}{f.name}", given._get_node(f.name), f.metadata.get(REGISTRY)
        if registry is not None and block is not None and block._is_interpolation():
            block = given[f.name]
        if not isinstance(block, DictConfig) or block._is_interpolation() or block._is_none():
            continue
        node = schema._get_node(f.name)
        if not isinstance(node, DictConfig):
            continue  # a mapping in place of a value: OmegaConf.merge in to_dataclass raises
        if registry is None:
            section = _section(hints[f.name])
            if section is None:
                continue
            if node._is_none():
                with read_write(schema):
                    schema[f.name] = OmegaConf.structured(section)
            _name_components(path, schema[f.name], section, block, f"{key}.")
            continue
        content = cast(dict[str, Any], OmegaConf.to_container(block))
        if registry.selector in content:
            content[registry.selector] = block[registry.selector]  # interpolated
        try:
            default = None if node._is_none() else getattr(OmegaConf.get_type(node), registry.selector)
            declared = registry.declaration(key, content, default)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        with read_write(schema):
            schema[f.name] = OmegaConf.structured(declared)
        _name_components(path, schema[f.name], declared, block, f"{key}.")


def _is_text(kind: Any, key: str, given: Sequence[DictConfig]) -> bool:
    """Return whether the dotted `key` is a field of type str of `kind`; `given`, later first, select components."""
    hint, each, path = kind, None, ""
    for name in key.split("."):
        path, registry, default, each = f"{path}.{name}".lstrip("."), each, None, None
        if registry is None:
            field = next((f for f in fields(hint) if f.name == name), None) if is_dataclass(hint) else None
            if field is None:
                return False
            hint = get_type_hints(hint)[name]
            registry, each = field.metadata.get(REGISTRY), field.metadata.get(EACH)
            default = field.default_factory() if registry and field.default_factory is not MISSING else None
        if registry is not None:
            selector = f"{path}.{registry.selector}"
            named = (OmegaConf.select(one, selector, throw_on_resolution_failure=False) for one in reversed(given))
            registry.names()  # imports the built-in components
            hint = registry.classes.get(next((n for n in named if n and isinstance(n, str)), ""), type(default))
        else:
            hint = _section(hint) or hint
    return hint in (str, str | None)


def _section(hint: Any) -> type | None:
    """Return the dataclass of a field that is a (possibly optional) section."""
    inner = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((cls for cls in inner if isinstance(cls, type) and is_dataclass(cls)), None)


def _similar_keys(key: str, kind: type) -> str:
    """Return `. Did you mean …?` with the keys of `kind` that are similar to the dotted `key`, or ''."""
    keys = list(_dotted(kind))
    section, _, name = key.partition(".")
    inner = [other for other in keys if other.startswith(f"{section}.") and other.endswith(f".{name}")]
    near = inner[:3] if name and inner else difflib.get_close_matches(key, keys, 1)
    return f". Did you mean {' or '.join(near)}?" if near else ""


def _dotted(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a dataclass and its nested dataclasses."""
    hints = get_type_hints(kind)
    for f in fields(cast(Any, kind)):
        yield f"{prefix}{f.name}"
        if (section := _section(hints[f.name])) is not None:
            yield from _dotted(section, f"{prefix}{f.name}.")


def first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """Return `dotted.key was …, is …` for the first difference of two plain config containers, or None."""
    return next((f"{dotted} was {was}, is {value}" for dotted, was, value in differences(before, now, key)), None)


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, before, now) for every difference of two plain config containers."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield key, before, now
        return
    for name in {**before, **now}:
        yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
