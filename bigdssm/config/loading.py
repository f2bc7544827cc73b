"""Read YAML files and `key=value` overrides into a Config or another dataclass, and compare two configs."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bigdssm.config.checks import check_config
from bigdssm.config.components import STAGES
from bigdssm.config.keys import Config
from bigdssm.config.removed import check_removed, former_defaults_in, without_former_defaults
from bigdssm.errors import ConfigError
from bigdssm.utils.arguments import checked
from bigdssm.utils.components import EACH, REGISTRY, default_of, keys_of, literal, read_fields, section_of

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


def config_from(source: Path, content: Any) -> Config:
    """Return the validated Config of a plain container, such as a written config. Raises ConfigError with `source`."""
    if isinstance(content, dict):
        content = without_former_defaults(content)
        _check_removed(source, content)
    config = to_dataclass(source, Config, content)
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
    for key in former_defaults_in(cast(dict[str, Any], OmegaConf.to_container(content))):
        section, _, name = key.rpartition(".")
        del OmegaConf.select(content, section)[name]
    changed = overridden(content, overrides, Config)
    _check_removed(path, OmegaConf.to_container(changed))
    changes = _parsed(overrides)
    for stage in STAGES:  # a rate on the command line is that of this command, also where it continues a model
        ratio = f"{stage}.optimizer.continue_lr_ratio"
        if _is_in(changes, f"{stage}.optimizer.lr") and not _is_in(changes, ratio):
            OmegaConf.update(changed, ratio, 1.0)
    return to_dataclass(path, Config, changed)


def _check_removed(source: Path, content: Any) -> None:
    """Raise ConfigError with `source` if a config has a key or value of an earlier version."""
    try:
        check_removed(content)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _parsed(overrides: Sequence[str]) -> list[DictConfig]:
    """Return the content of each override that is YAML."""
    contents = []
    for override in overrides:
        with suppress(*NO_VALUE):
            contents.append(OmegaConf.from_dotlist([override]))
    return contents


def _is_in(contents: Sequence[DictConfig], key: str) -> bool:
    """Return whether one of the contents has a value of `key`."""
    return any(OmegaConf.select(content, key, throw_on_resolution_failure=False) is not None for content in contents)


def load_written_config(path: Path) -> Config:
    """Return the validated Config of a YAML file written by a stage, without interpolation of `${…}`.

    Raises ConfigError as `load_config` does.
    """
    return config_from(path, literal(OmegaConf.to_container(read_yaml(path, "the sections run, data, model, …"))))


def options_of(overrides: Sequence[str], kind: type) -> dict[str, Any]:
    """Return the `key=value` options of a component of the class `kind`. Raises ConfigError."""
    return cast(dict[str, Any], OmegaConf.to_container(overridden(OmegaConf.create({}), overrides, kind)))


def overridden(content: DictConfig, overrides: Sequence[str], kind: type) -> DictConfig:
    """Return `content` with `key=value` overrides, one after the other; `kind` is its dataclass. Raises ConfigError.

    The value of a field of type str is the rest of the word, unless it is empty, null or in quotes; others are YAML
    without comments. See `_merged` for mappings; `key[0]` is an element of a list.
    """
    for override in overrides:
        if not re.match(r"\w[^\[\]=]*(\[\d+\][^\[\]=]*)*=", override):
            raise ConfigError(f"override {override!r} is not of the form key=value, for example pretrain.steps=100")
    selecting = [content, *_parsed(overrides)]  # an override may precede the one that selects its component
    for override in overrides:
        key, _, value = override.partition("=")
        is_yaml = value.strip()[:1] in "'\"" or value.strip().lower() in ("null", "~", "???")
        change = OmegaConf.create({})
        try:
            if not is_yaml and _is_text(kind, key, selecting):
                OmegaConf.update(change, key, value)
            else:
                _check_value(override, value)
                change = OmegaConf.from_dotlist([override])
            if "[" in key:
                content = copy.deepcopy(content)
                content.merge_with_dotlist([override])
            else:
                content = _merged(kind, content, change)
        except NO_VALUE as error:
            raise ConfigError(f"override {override!r} has no YAML value: {' '.join(str(error).split())}") from None
    return content


def _merged(kind: Any, given: DictConfig, later: DictConfig) -> DictConfig:
    """Merge `later` over `given`, contents of the dataclass `kind`: mappings key by key; other values replace.

    An empty mapping also replaces, at any depth. If `later` selects another component by name, the keys that it lacks
    are removed.
    """
    retained, changes = OmegaConf.to_container(given), OmegaConf.to_container(later)
    _remove_replaced(kind, retained, changes)
    return cast(DictConfig, OmegaConf.merge(retained, changes))


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
        raise ConfigError(f"{path}: {error.full_key or 'key'}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} contains a list, needs {needs}")
    return content


def to_dataclass(path: Path, kind: type[Kind], content: Any) -> Kind:
    """Read `content` into the dataclass `kind`. Raises ConfigError that names the key."""
    try:
        given = cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.create(content)))
        # Interpolations may name keys that have their defaults.
        complete = OmegaConf.create(_with_defaults(kind, given))
        return read_fields(kind, "", OmegaConf.to_container(complete, resolve=True))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or kind.__name__.lower()}: {str(error).splitlines()[0]}") from None


def _remove_replaced(kind: Any, given: Any, later: Any) -> None:
    """Remove the values of `given` that are not merged with those of `later`; see `_merged`."""
    declared = {f.name: f for f in fields(kind)} if kind is not None else {}
    for key, block in later.items():
        before, field = given.get(key), declared.get(key)
        if block == {} or isinstance(before, list) != isinstance(block, list):
            given.pop(key, None)
        elif isinstance(before, dict) and isinstance(block, dict):
            registry = None if field is None else field.metadata.get(REGISTRY)
            if registry is None:
                _remove_replaced(section_of(get_type_hints(kind)[key]) if field else None, before, block)
            elif (name := block.get(registry.selector)) in registry.names() and name != before.get(registry.selector):
                valid = {*keys_of(registry.find(name, "")), registry.selector}
                given[key] = {inner: value for inner, value in before.items() if inner in valid}


def _with_defaults(kind: Any, content: dict[Any, Any]) -> dict[Any, Any]:
    """Return plain content with the defaults of absent keys, those of components named in it included."""
    result, hints = dict(content), get_type_hints(kind)
    for f in fields(kind):
        default, section, registry = default_of(f), section_of(hints[f.name]), f.metadata.get(REGISTRY)
        value = result.setdefault(f.name, {} if is_dataclass(default) else default)
        if not isinstance(value, dict):
            continue
        if registry is not None:
            name = value.get(registry.selector, getattr(default, registry.selector, None))
            section = registry.classes.get(name) if isinstance(name, str) and name in registry.names() else None
        if section is not None:
            result[f.name] = _with_defaults(section, value)
    return result


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
            hint = section_of(hint) or hint
    return hint in (str, str | None)


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
