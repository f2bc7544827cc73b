"""The JSON Schema of configs: the committed file is current, and rejects the same configs as the loader."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from omegaconf import DictConfig, OmegaConf

from bigdssm.commands import config as command
from bigdssm.config import Config, load_config
from bigdssm.config.loading import overridden, to_dataclass
from bigdssm.config.schema import comments
from bigdssm.errors import ConfigError
from bigdssm.features.base import FEATURES
from bigdssm.utils.components import BOUND, REGISTRY, bounded

CONFIGS = Path(__file__).parents[3] / "configs"
SCHEMA = CONFIGS / "config.schema.json"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
EXAMPLE = CONFIGS / "movielens_100k.yaml"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    content = json.loads(SCHEMA.read_text("utf-8"))
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


@dataclass(frozen=True)
class Commented:
    """A dataclass with comments in all possible positions."""

    plain: int = 0
    behind: int = bounded(1, 0, below=9)  # said behind
    # Said above,
    # in two lines.
    above: str | None = None  # and behind
    within: int = (
        2  # said within
    )  # fmt: skip


def test_a_comment_belongs_to_its_field() -> None:
    found = comments(Commented)
    assert found["plain"] == "" and found["behind"] == "said behind"
    assert found["above"] == "Said above, in two lines. and behind"
    assert found["within"].startswith("said within")


def test_the_committed_schema_is_that_of_the_source() -> None:
    printed = subprocess.run(  # in a separate process: other tests register components
        [sys.executable, "-m", "bigdssm.commands", "config", "--schema"], capture_output=True, text=True, check=True
    ).stdout
    assert SCHEMA.read_text("utf-8") == printed, f"run bigdssm config --schema > configs/{SCHEMA.name}"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_shipped_configs_name_the_schema_and_are_valid(
    file: Path, validator: Draft202012Validator, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert file.read_text("utf-8").splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA.name}"
    validator.validate(OmegaConf.to_container(OmegaConf.load(file)))
    given = ["run.seed=7"]
    if "text.init=null" in file.read_text("utf-8"):  # the pretrained folder is not part of the repository
        given += ["model.query.text.init=null", "model.dim=128", "pretrain.loss.widths=[]"]
    assert command.main(["--config", str(file), *given]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    validator.validate(yaml.safe_load(resolved.read_text()))
    assert load_config(resolved) == load_config(file, given)


@pytest.mark.parametrize(
    "override",
    [
        "pretrain.steps=${run.seed}", "sft=${pretrain}", "pretrain.optimizer=${sft.optimizer}",
        "data.doc.genres.min_count=${data.lanes}", "pretrain.optimizer={eps: 1e-6, name: adamw}",
        "engine.keep_graph_tokens=null",
        "pretrain.optimizer.name=${sft.optimizer.name}", "model.score=${run.dir}", "data.lanes=8.0", "sft=null",
        "sft.distillation=null", "sft.distillation={name: kl, temperature: 2}",
    ],
)  # fmt: skip
def test_accepted(validator: Draft202012Validator, override: str) -> None:
    assert best_match(validator.iter_errors(changed(override))) is None


def test_a_required_value_may_be_left_to_an_override(validator: Draft202012Validator) -> None:
    validator.validate({**OmegaConf.to_container(OmegaConf.load(EXAMPLE)), "data": {"dir": "???"}})  # type: ignore[dict-item]


def test_whole_numbers_may_have_a_decimal_point_as_in_the_schema() -> None:
    given = [
        "data.lanes=8.0",
        "pretrain.loss.widths=[8.0, 4]",
        "data.doc.genres.min_count=2.0",
        "engine.keep_graph_tokens=1e3",
    ]
    config = load_config(EXAMPLE, given)
    assert config == load_config(EXAMPLE, [key.replace(".0", "").replace("1e3", "1000") for key in given])
    texts = ["data.lanes='8'", "engine.compile='yes'", "engine.peer_timeout_s='9.5'"]  # as of ${oc.env:…}
    assert load_config(EXAMPLE, texts) == load_config(EXAMPLE, [word.replace("'", "") for word in texts])
    with pytest.raises(ConfigError, match=r"data\.lanes: .*8\.5"):
        load_config(EXAMPLE, ["data.lanes=8.5"])


def test_a_class_without_a_source_file_has_no_comments() -> None:
    assert comments(make_dataclass("Typed", [("x", int, 3)], frozen=True)) == {}


def test_the_command_refuses_models_and_folders_that_a_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, reason in (
        ("model.dim=7", "history has width 64, but model.dim=7"),
        ("pretrain.validation_metric=map", "pretrain.validation_metric: got map"),
        (f"sft.init={tmp_path}/none", "none, which does not exist"),
    ):
        assert command.main(["--config", str(EXAMPLE), override]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("pretrain.rows_globl=64", "pretrain: Additional properties are not allowed ('rows_globl' was unexpected)"),
        ("modle={}", ": Additional properties are not allowed ('modle' was unexpected)"),
        ("sft={epoch: 1}", "sft: Additional properties are not allowed ('epoch' was unexpected)"),
        ("data.query.age.wide=1", "data.query.age: Additional properties are not allowed ('wide' was unexpected)"),
        (
            "pretrain.optimizer.momentum=0.9",
            "pretrain.optimizer: Additional properties are not allowed ('momentum' was unexpected)",
        ),
        ("pretrain.rows_global=many", "pretrain.rows_global: 'many' does not match"),
        ("pretrain.rows_global=0.5", "pretrain.rows_global: 0.5 is not of type 'integer'"),
        ("pretrain=null", "pretrain: None is not of type 'object'"),
        ("model.query.mlp=8", "model.query.mlp: 8 is not of type 'array'"),
        ("pretrain.optimizer.betas=[0.9]", "pretrain.optimizer.betas: [0.9] is too short"),
        ("engine.zero_stage=4", "engine.zero_stage: 4 is greater than the maximum of 3"),
        ("data.lanes=0", "data.lanes: 0 is less than the minimum of 1"),
        ("model.query.dropout=1", "model.query.dropout: 1 is greater than or equal to the maximum of 1"),
        ("model.query.mlp=[8, 0]", "model.query.mlp.1: 0 is less than the minimum of 1"),
        ("pretrain.optimizer.lr=11", "pretrain.optimizer.lr: 11 is greater than the maximum of 10"),
        ("model.score=euclid", "model.score: 'euclid'"),
        ("pretrain.optimizer.name=adamm", "pretrain.optimizer.name: 'adamm'"),
        ("data.query.age.type=number", "data.query.age.type: 'number'"),
        ("sft.distillation={weight: 1}", "sft.distillation: 'name' is a required property"),
        (
            "sft.distillation={name: kl, width: 8}",
            "sft.distillation: Additional properties are not allowed ('width' was unexpected)",
        ),
        ("data.query.old={column: age}", "data.query.old: 'type' is a required property"),
    ],
)
def test_refused_as_the_loader_does(validator: Draft202012Validator, override: str, error: str) -> None:
    found = best_match(validator.iter_errors(changed(override)))
    assert found is not None
    assert f"{'.'.join(map(str, found.absolute_path))}: {found.message}".startswith(error)
    with pytest.raises(ConfigError):
        load_config(EXAMPLE, [override])


def keys_and_values(rng: random.Random, cls: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a dataclass, and of a component of each kind, with a random value that JSON has."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("fitted"):
            continue
        name, registry = f"{key}.{field.name}", field.metadata.get(REGISTRY)
        section = hints[field.name] if registry is None else registry.find(rng.choice(registry.names()), "")
        if dataclasses.is_dataclass(section):
            yield name, rng.choice([None, {}, [], "x", {"nothing": 1}])
            if registry is not None:
                yield f"{name}.{registry.selector}", rng.choice([*registry.names(), "nobody", None, [], {}])
            yield from keys_and_values(rng, section, name)
            continue
        kinds = {hints[field.name], *get_args(hints[field.name])}
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        limits = dataclasses.astuple(field.metadata[BOUND]) if BOUND in field.metadata else ()
        numbers = [limit + step for limit in limits if limit is not None for step in (-1, 0, 1)]
        values = [*numbers, *choices, -1, 0.5, 1, 4, 2**70, 1e300, None, True, "x", [], {}, [[]], [None], {"a": 1}]
        value = rng.choice([*values, [rng.choice(values)], [rng.choice(values), rng.choice(values)]])
        # Not a number for a text or a boolean: the loader converts scalars, since an interpolation is a text.
        scalars = value if isinstance(value, list) else [value]
        if not {"str", "bool"} & set(re.findall(r"\w+", str(hints[field.name]))) or not any(
            isinstance(one, int | float) for one in scalars
        ):
            yield name, value


@pytest.mark.slow
def test_the_schema_and_the_loader_accept_the_same_random_configs(validator: Draft202012Validator) -> None:
    rng, counts = random.Random(0), Counter[bool]()
    example = OmegaConf.to_container(OmegaConf.load(EXAMPLE))
    for _ in range(1000):
        content, keys = copy.deepcopy(example), list(keys_and_values(rng, Config, ""))
        feature = f".data.{rng.choice(['query', 'doc', 'event', 'filter'])}.f"
        kind = rng.choice(FEATURES.names())
        of_feature = [(f"{feature}.type", kind), *keys_and_values(rng, FEATURES.find(kind, ""), feature)]
        drawn = [*rng.sample(keys, rng.choice([0, 1, 1, 2, 3])), *of_feature[: rng.choice([0, 1, 3])]]
        for key, value in drawn:
            *sections, name = key.lstrip(".").split(".")
            block: Any = content
            for section in sections:
                block[section] = block.get(section) if isinstance(block.get(section), dict) else {}
                block = block[section]
            block[name] = value
        is_valid, reason = validator.is_valid(content), ""
        try:
            to_dataclass(Path("config.yaml"), Config, content)
        except ConfigError as error:
            reason = str(error)
        assert is_valid == (not reason), (drawn, reason, best_match(validator.iter_errors(content)))
        counts[is_valid] += 1
    assert min(counts.values()) > 200, counts


def test_folders_must_be_given(validator: Draft202012Validator) -> None:
    messages = {error.message for error in validator.iter_errors({"data": {}})}
    assert messages == {"'run' is a required property", "'dir' is a required property"}


def changed(override: str) -> Any:
    """Return the example with an override, without resolving interpolations."""
    example = OmegaConf.load(EXAMPLE)
    assert isinstance(example, DictConfig)
    return OmegaConf.to_container(overridden(example, [override], Config))


def test_the_command_refuses_overrides_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--schema", "run.seed=1"]) == 2
    assert capsys.readouterr().err == "error: --schema takes no key=value, got run.seed=1; leave it out\n"
