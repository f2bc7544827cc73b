"""A YAML file that people write, read whole or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from bigdssm.errors import ConfigError

Kind = TypeVar("Kind")


def read_yaml(path: Path, needs: str) -> DictConfig:
    """Return the mapping that a YAML file holds. Raises ConfigError: no such file, no YAML, or not what it `needs`."""
    try:
        content: DictConfig | ListConfig = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {' '.join(str(error).split())}") from None
    except OSError as error:  # what omegaconf raises of a lone word or number, too
        raise ConfigError(f"{path} cannot be read, needs {needs}: {error.strerror or error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'key'}: {first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path} holds a list, needs {needs}")
    return content


def as_kind(path: Path, kind: type[Kind], *contents: Any) -> Kind:
    """Return `contents`, later ones over earlier, as the dataclass `kind`. Raises ConfigError: which key is wrong."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), *contents)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{path}: required key {missing[0]} is missing; give it a value")
        return cast(Kind, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise ConfigError(f"{path}: unknown key {error.full_key}: {first_line(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or kind.__name__.lower()}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return what omegaconf says of a key, without the lines that repeat it."""
    return str(error).splitlines()[0]
