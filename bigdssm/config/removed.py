"""Config keys of earlier versions, and values of keys, which this version has no longer.

A written config (of a run, a checkpoint or a model folder) has every key, also those at their defaults, and may be
given as --config again. A removed key at its former default is therefore dropped from any file. Any other value, and
any on the command line, is refused with the alternative. So is the removed name of a component, unless a plugin has
registered one of that name.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bigdssm.config.components import LOSSES, OPTIMIZERS, SAMPLINGS, STAGES, TABLE_OPTIMIZERS
from bigdssm.config.keys import HISTORY_BLOCKS
from bigdssm.errors import ConfigError
from bigdssm.utils.components import Registry

TOWERS = ("model.query", "model.doc")


class RemovedKey(NamedTuple):
    """A key of an earlier version."""

    default: Any  # its former default, which this version computes without the key
    alternative: str  # why it was removed, and what replaces it


class RemovedValue(NamedTuple):
    """A value of a key, which the key has no longer."""

    key: str
    value: str
    alternative: str  # why it was removed, and what replaces it
    registry: Registry[Any] | None  # of the components that the key names; None: it names none


_STALE_TEXTS = RemovedKey(
    default=0,
    alternative=(
        "columns with text vectors of an earlier step lowered NDCG@10 from 0.0503 to 0.0094 at 50 steps; delete the "
        "key: columns: catalogue encodes all texts in every step, and columns: batch those of the batch"
    ),
)
_POPULAR = RemovedKey(
    default=0,
    alternative=(
        "documents drawn by popularity were no better than uniform ones (NDCG@10 0.0381 and 0.0384 with 4,096 of "
        "them); delete the key, and set negatives.uniform"
    ),
)
_SCORER = RemovedKey(
    default=None,
    alternative=(
        "re-ranking is a cross-encoder of sentence-transformers, which docs/ranking.md trains; delete the key, and "
        "search with --rerank K --reranker FOLDER"
    ),
)
_RERANK = RemovedKey(
    default=50, alternative="validation ranks by the towers alone; delete the key, and evaluate with --rerank K"
)
_NORM_PENALTY = RemovedKey(
    default=0.0,
    alternative=(
        "a penalty of norms with score=dot was not measurably better than score=cosine (NDCG@10 -0.0020 "
        "[-0.0088, +0.0043]); delete the key, and set model.score=cosine or optimizer.weight_decay"
    ),
)
REMOVED_KEYS: dict[str, RemovedKey] = {
    "pretrain.loss.norm_penalty": _NORM_PENALTY,
    "sft.loss.norm_penalty": _NORM_PENALTY,
    "pretrain.negatives.popular": _POPULAR,
    "sft.negatives.popular": _POPULAR,
    "pretrain.scorer": _SCORER,
    "sft.scorer": _SCORER,
    "pretrain.rerank": _RERANK,
    "sft.rerank": _RERANK,
    "pretrain.negatives.refresh_every_steps": _STALE_TEXTS,
    "sft.negatives.refresh_every_steps": _STALE_TEXTS,
    "model.beta_init": RemovedKey(
        default=-10.0,
        alternative="it was the first value of beta: scalar, which was removed with the loss sigmoid; delete the key",
    ),
    "data.mixture_batches": RemovedKey(
        default="mixed",
        alternative=(
            "no measurement showed a gain of steps with rows of one source; delete the key: each lane of a step has "
            "rows of one source"
        ),
    ),
    "data.tail": RemovedKey(
        default="carry",
        alternative=(
            "no measurement showed a gain of dropped rows; delete the key: the last rows of an epoch are carried over "
            "to the next one"
        ),
    ),
    "engine.loss_tile": RemovedKey(
        default=None,
        alternative=(
            "no measurement showed a gain over the tile that the loss chooses by the device; delete the key (the "
            "functions of bigdssm.losses have an argument tile)"
        ),
    ),
    "engine.table_cache_rows": RemovedKey(
        default=0,
        alternative=(
            "no measurement showed a gain of a cache on the device; delete the key: table_memory: device has all rows "
            "on the device, and host or file none"
        ),
    ),
}
REMOVED_VALUES: tuple[RemovedValue, ...] = tuple(
    RemovedValue(f"{section}.{key}", value, alternative, registry)
    for sections, key, value, alternative, registry in (
        (
            STAGES,
            "optimizer.name",
            "muon",
            "no measurement showed a gain over adamw; write adamw, or register an optimizer (docs/extending.md)",
            OPTIMIZERS,
        ),
        (
            STAGES,
            "sampling.name",
            "classic",
            "no measurement on real data showed a gain; write corrected, which leaves the positive's score as it is",
            SAMPLINGS,
        ),
        (
            STAGES,
            "loss.name",
            "sigmoid",
            "no measurement showed a gain; write softmax, pair_ce or triplet",
            LOSSES,
        ),
        (
            ("model",),
            "beta",
            "scalar",
            "only the removed loss sigmoid could learn it; write none, which ranks the same",
            None,
        ),
        (
            STAGES,
            "table_optimizer.name",
            "adagrad",
            "no measurement showed a gain of a state per number; write rowwise_adagrad, with a state per row",
            TABLE_OPTIMIZERS,
        ),
        (
            STAGES,
            "table_optimizer.name",
            "sgd",
            "no measurement showed a gain over the others; write rowwise_adagrad, or register one (docs/extending.md)",
            TABLE_OPTIMIZERS,
        ),
        (
            TOWERS,
            "history.block",
            "hstu",
            "only figures of other projects showed a gain; write gated or lowpass (docs/measurements.md)",
            HISTORY_BLOCKS,
        ),
        (
            TOWERS,
            "history.positions",
            "absolute",
            "no measurement showed a gain; write relative or rotary, which also allow several queries per row",
            None,
        ),
    )
    for section in sections
)


def check_removed(content: Mapping[str, Any]) -> None:
    """Raise ConfigError if the plain content of a config has a removed key or value."""
    for key, removed, value in _removed_in(content):
        raise ConfigError(f"{key}: got {value!r:.80}, needs no such key, which was removed: {removed.alternative}")
    for entry in REMOVED_VALUES:
        section, name = _section_of(content, entry.key)
        names = () if entry.registry is None else entry.registry.names()
        if section.get(name) == entry.value and entry.value not in names:
            raise ConfigError(f"{entry.key}: got {entry.value}, which was removed: {entry.alternative}")


def former_defaults_in(content: Mapping[str, Any]) -> list[str]:
    """Return the removed keys that the plain content of a config has at their former defaults."""
    return [key for key, removed, value in _removed_in(content) if value == removed.default]


def without_former_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain content of a config without removed keys at their former defaults."""
    remaining = copy.deepcopy(dict(content))
    for key in former_defaults_in(content):
        *sections, name = key.split(".")
        section = remaining
        for part in sections:
            section = section[part]
        del section[name]
    return remaining


def _removed_in(content: Mapping[str, Any]) -> Iterator[tuple[str, RemovedKey, Any]]:
    """Yield every removed key in a config, with its value."""
    for key, removed in REMOVED_KEYS.items():
        section, name = _section_of(content, key)
        if name in section:
            yield key, removed, section[name]


def _section_of(content: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], str]:
    """Return the section of a dotted key, empty if it is absent, and the key's name in it."""
    *sections, name = key.split(".")
    section: Any = content
    for part in sections:
        section = section.get(part) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), name
