"""Write docs/config_keys.md: every key of a config, with type, default, bounds and what it means.

    PYTHONPATH=. python tools/site/config_keys.py

Types, defaults and bounds are the dataclasses' own; what a key means is the comment that stands at its field.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import omegaconf

from bigdssm.config.keys import (
    DISTILLATIONS,
    HISTORY_BLOCKS,
    LOSSES,
    OPTIMIZERS,
    SAMPLINGS,
    SCORERS,
    TEXT_ENCODERS,
    Config,
    DistillationConfig,
    HistoryEncoderConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    ScorerConfig,
    TextEncoderConfig,
)
from bigdssm.config.schema import all_comments, default_of
from bigdssm.export.formats import EXPORT_FORMATS
from bigdssm.features.base import FEATURES
from bigdssm.retrieval.index_types import INDEX_TYPES
from bigdssm.utils.bounds import BOUND
from bigdssm.utils.components import REGISTRY, Registry, keys_of

HEAD = "| key | type | default | bounds | |\n|---|---|---|---|---|"
PAGE = Path(__file__).parents[2] / "docs/config_keys.md"
START = """\
<!-- Made by tools/site/config_keys.py from the declarations in bigdssm/: edit those, and run it. -->

# Config keys

A run's YAML has the sections `run`, `data`, `model`, `engine`, `pretrain` and, for fine-tuning, `sft`. On the command
line `section.key=value` changes a key. An unknown key, or a number out of its bounds, ends the command with exit code 2
before anything is written. `bigdssm config --config my.yaml` prints the resolved config.

Editors complete and check keys by a JSON Schema, which also contains the components of installed plugins. Write it with
`bigdssm config --schema > config.schema.json`, and name it in the first line of a config:

    # yaml-language-server: $schema=config.schema.json

## Sections"""
FEATURE_TYPES = """\
## Types of features

`data.query` and `data.doc` name features, each of a type:

    data:
      query:
        age: {type: numeric}"""
INDEXES = """\
## Types of index

`bigdssm build_index --type TYPE KEY=VALUE …` takes the options of a type:"""
EXPORTS = """\
## Export formats

`bigdssm convert_checkpoint --format FORMAT KEY=VALUE …` takes the options of a format:"""
OPTIMIZER_KINDS = """\
## Optimizers

Beside the keys of every optimizer, `STAGE.optimizer` has those of the one that `name` says:"""
TEXTS = """\
## Text encoders

Beside the keys of every text encoder, `model.SIDE.text` has those of the one that `type` says:"""
LOSS_KINDS = """\
## Losses

Beside the keys of every loss, `STAGE.loss` has those of the one that `name` says:"""
SAMPLING_KINDS = """\
## Sampling corrections

`STAGE.sampling` has the keys of the one that `name` says:"""
DISTILLATION_KINDS = """\
## Distillations

Beside the keys of every distillation, `STAGE.distillation` has those of the one that `name` says:"""
SCORER_KINDS = """\
## Scorers

`STAGE.scorer` has the keys of the one that `name` says:"""
BLOCKS = """\
## Sequence blocks

Beside the keys of every block, `model.query.history` has those of the one that `block` says:"""
COMPONENTS: tuple[tuple[str, Registry[Any], Any], ...] = (
    (FEATURE_TYPES, FEATURES, None),
    (TEXTS, TEXT_ENCODERS, TextEncoderConfig),
    (BLOCKS, HISTORY_BLOCKS, HistoryEncoderConfig),
    (LOSS_KINDS, LOSSES, LossConfig),
    (SAMPLING_KINDS, SAMPLINGS, SamplingConfig),
    (DISTILLATION_KINDS, DISTILLATIONS, DistillationConfig),
    (SCORER_KINDS, SCORERS, ScorerConfig),
    (OPTIMIZER_KINDS, OPTIMIZERS, OptimizerConfig),
    (INDEXES, INDEX_TYPES, None),
    (EXPORTS, EXPORT_FORMATS, None),
)


def page() -> str:
    """Return the page as Markdown."""
    components = [part for about, *some in COMPONENTS for part in (about, *component_sections(*some))]
    return "\n\n".join([START, *sections(Config), *components]) + "\n"


def sections(root: type) -> Iterator[str]:
    """Yield a heading and a table for each dataclass that `root` reaches, with all the keys where it may stand."""
    places: dict[type, list[str]] = {}
    components: dict[type, Any] = {}
    _collect(root, "", places, components)
    for cls, prefixes in places.items():
        if table := "\n".join(_rows(cls, default=components.get(cls))):
            title = ", ".join(f"`{prefix}`" for prefix in prefixes)
            yield f"### {title}\n\n{inspect.getdoc(cls)}\n\n{HEAD}\n{table}"


def component_sections(registry: Registry[Any], base: Any) -> Iterator[str]:
    """Yield a heading and a table of keys for each component of the library, without those of `base`."""
    common = [] if base is None else keys_of(base)
    for name in registry.names():
        cls = registry.classes[name]
        rows = "\n".join(_rows(cls, common))
        yield f"### `{registry.selector}: {name}`\n\n{inspect.getdoc(cls)}" + (f"\n\n{HEAD}\n{rows}" if rows else "")


def _collect(cls: type, prefix: str, places: dict[type, list[str]], components: dict[type, Any]) -> None:
    """Add where dataclasses stand to `places`, and the default component of each kind to `components`."""
    places.setdefault(cls, []).append(prefix)
    by_name = {f.name: f for f in fields(cls)}
    for name, hint in get_type_hints(cls).items():
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner) and isinstance(inner, type):
                many = "[]" if getattr(hint, "__origin__", None) is list else ""
                _collect(inner, f"{prefix}.{name}{many}".lstrip("."), places, components)
                if name in by_name and REGISTRY in by_name[name].metadata:
                    components[inner] = default_of(by_name[name])


def _rows(cls: type, without: Sequence[str] = (), default: Any = None) -> Iterator[str]:
    """Yield a row of the table for each field that is a value, not a section of its own."""
    notes, hints = all_comments(cls), get_type_hints(cls)
    for field in fields(cls):
        if field.name in without or REGISTRY in field.metadata:
            continue
        if field.metadata.get("fitted") or is_dataclass(field.default_factory) or _is_section(hints[field.name]):
            continue
        cells = (
            _type(str(field.type)),
            _default(field, default),
            field.metadata.get(BOUND, ""),
            notes.get(field.name, ""),
        )
        yield f"| `{field.name}` | " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _is_section(hint: Any) -> bool:
    return any(is_dataclass(inner) for inner in get_args(hint)) and getattr(hint, "__origin__", None) is not list


def _type(source: str) -> str:
    """Return an annotation as people say it: the choices of a Literal, else its source."""
    node = ast.parse(source, mode="eval").body
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return ", ".join(f"`{choice}`" for choice in ast.literal_eval(node.slice))
    return f"`{source}`"


def _default(field: Field[Any], component: Any) -> str:
    """Return a default as YAML writes it; that of a kind of components is the default component's."""
    value = default_of(field)
    if component is not None and value == omegaconf.MISSING:
        value = getattr(component, field.name)
    return "must be given" if value == omegaconf.MISSING else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
