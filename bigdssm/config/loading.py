"""A Config of a YAML file and `key=value` overrides, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from bigdssm.config.checks import check_config
from bigdssm.config.keys import Config, first_line
from bigdssm.errors import ConfigError


def config_of(config: Config | str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return a Config as it is, or that of a YAML file with `overrides`. Raises ConfigError."""
    if not isinstance(config, Config):
        return load_config(config, overrides)
    if overrides:
        raise ConfigError("key=value changes a config file; of a Config make another with dataclasses.replace")
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the checked Config of the YAML file `path` with `key=value` overrides (dotted keys, YAML values).

    Raises ConfigError: missing file, YAML that does not parse, unknown or missing keys, wrong types, or values that
    do not go together.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; --config takes a YAML file such as those in configs/")
    for override in overrides:
        if not re.match(r"\w[^\[\]=]*(\[\d+\][^\[\]=]*)*=", override):
            raise ConfigError(f"override {override!r} is not of the form key=value, for example pretrain.steps=100")
    try:
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ConfigError(f"{path} holds a list, needs the sections run, data, model, …")
        merged = OmegaConf.merge(OmegaConf.structured(Config), content, OmegaConf.from_dotlist(list(overrides)))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{path}: required key {missing[0]} is missing; give it a value")
        config = cast(Config, OmegaConf.to_object(merged))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {' '.join(str(error).split())}") from None
    except OSError as error:  # what omegaconf raises of a lone word or number, too
        raise ConfigError(f"{path} cannot be read as a config: {error}") from None
    except ConfigKeyError as error:
        raise ConfigError(f"{path}: unknown key {error.full_key}: {first_line(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'config'}: {first_line(error)}") from None
    check_config(config)
    return config
