"""Load a Config from a YAML file and `key=value` overrides, and validate it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bigdssm.config.checks import check_config
from bigdssm.config.keys import Config
from bigdssm.config.yaml_files import is_text, read_yaml, to_dataclass
from bigdssm.errors import ConfigError
from bigdssm.utils.arguments import checked
from bigdssm.utils.components import literal

NO_VALUE = yaml.YAMLError, OmegaConfBaseException, RecursionError  # of an override


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
            if is_yaml or not is_text(kind, key, given):
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
