"""The values that a search may take, as YAML: key → bounds or choices.

pretrain.optimizer.lr: {low: 1.0e-3, high: 1.0e-2, log: true}
pretrain.loss.negatives: {low: 5, high: 100}        # whole numbers, where both bounds are
model.score: {choices: [dot, cosine]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from bigdssm.config.reading import read_yaml
from bigdssm.errors import ConfigError

KNOWN = ("low", "high", "log", "choices")


@dataclass(frozen=True)
class Space:
    """Where each key's values come from."""

    keys: dict[str, BaseDistribution]

    def inside(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `values` that the search could propose itself."""
        return {key: value for key, value in values.items() if key in self.keys and _allows(self.keys[key], value)}

    def ends(self) -> Iterator[tuple[str, Any]]:
        """Yield (key, value) of the least and the largest of each, and of every choice."""
        for key, distribution in self.keys.items():
            if isinstance(distribution, CategoricalDistribution):
                yield from ((key, choice) for choice in distribution.choices)
            else:
                assert isinstance(distribution, IntDistribution | FloatDistribution)
                yield from ((key, distribution.low), (key, distribution.high))


def read_space(path: Path) -> Space:
    """Return the space of a YAML file. Raises ConfigError: what is wrong with it."""
    needs = "keys with their values, such as `pretrain.optimizer.lr: {low: 1.0e-3, high: 1}`"
    content = cast(dict[Any, Any], OmegaConf.to_container(read_yaml(path, needs)))
    if not content:
        raise ConfigError(f"{path} is empty, needs {needs}")
    return Space({str(key): _distribution(f"{path}: {key}", given) for key, given in content.items()})


def _distribution(where: str, given: Any) -> BaseDistribution:
    if not isinstance(given, dict) or set(given) - set(KNOWN):
        raise ConfigError(f"{where}: got {given!r}, needs {{low: …, high: …, log: true or false}} or {{choices: […]}}")
    if "choices" in given:
        choices = given["choices"]
        if len(given) > 1 or not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: got {given!r}, needs a list of choices alone")
        return CategoricalDistribution(choices)
    low, high, log = given.get("low"), given.get("high"), given.get("log", False)
    if not (_is_number(low) and _is_number(high) and low <= high and isinstance(log, bool) and (low > 0 or not log)):
        raise ConfigError(f"{where}: got {given!r}, needs numbers low <= high, above 0 with log: true")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _allows(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return _is_number(value) and distribution.low <= value <= distribution.high


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
