"""Config loading: defaults, overrides, shipped configs, and error messages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from bigdssm.config import OPTIMIZERS, Config, config_of, first_difference, load_config
from bigdssm.config.loading import load_written_config, overridden, read_config
from bigdssm.errors import ConfigError
from bigdssm.losses import Triplet
from bigdssm.models.declarations import LowPass
from bigdssm.training.optimizers import AdamW
from bigdssm.utils.components import bounded
from tests.minimal import MINIMAL

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return file


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps": 2.5}, "Config: pretrain.steps: .*2.5"),
        ({"steps": -1}, "pretrain.steps: got -1, needs at least 0"),
        ({"steps": "two"}, "Config: pretrain.steps: .*two"),
        ({"steps": object()}, "Config: .* is not a string, number, list or mapping"),
        ({"optimizer": AdamW(lr=float("nan"))}, "pretrain.optimizer.lr: got nan, needs a finite number"),
    ],
)
def test_a_config_of_python_callers_is_checked_as_a_file_is(path: Path, given: dict[str, Any], sentence: str) -> None:
    loaded = load_config(path)
    with pytest.raises(ConfigError, match=sentence):
        config_of(replace(loaded, pretrain=replace(loaded.pretrain, **given)))


def test_a_config_of_python_callers_may_hold_paths_and_numpys_numbers(path: Path) -> None:
    loaded = load_config(path)
    stage = replace(loaded.pretrain, steps=np.int64(2), epochs=np.float32(0.5))
    given = config_of(replace(loaded, run=replace(loaded.run, dir=Path("a/b")), pretrain=stage))
    assert (given.run.dir, given.pretrain.steps, given.pretrain.epochs) == ("a/b", 2, 0.5)
    assert type(given.pretrain.steps) is int and config_of(loaded) == loaded


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("pretrain.lr", "did you mean pretrain.optimizer.lr or pretrain.table_optimizer.lr?"),
        ("sft.hard", "did you mean sft.negatives.hard?"),
        ("sft.file", "did you mean sft.negatives.mining.file?"),
        ("model.embedding_dim", "did you mean model.query.embedding_dim or model.doc.embedding_dim?"),
        ("pretrain.loss.nmae", "position_bias, position_bias_lr, direction; did you mean pretrain.loss.name?"),
        ("engin.precision", "did you mean engine?"),
    ],
)
def test_an_unknown_key_names_the_one_that_is_meant(path: Path, key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        load_config(path, [f"{key}=1"])
    assert meant in str(caught.value)


def test_an_unknown_loss_or_optimizer_may_be_one_that_was_not_imported(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs one of fps, .*, or a loss whose module is imported first"):
        load_config(path, ["pretrain.loss.name=mine"])


def test_a_minimal_config_loads_and_survives_its_own_yaml(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["model.query.mlp=[32, 16]", "sft={}"])
    assert config.model.query.mlp == (32, 16)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.dir=/data/run #3", "/data/run #3"),
        ("run.dir=010", "010"),
        ("run.dir=1e3", "1e3"),
        ("run.dir=[a: b", "[a: b"),
        ("run.dir='/data #3'", "/data #3"),
        ("run.dir=${data.dir}/x #3", "data/x/x #3"),
        ("pretrain.init=null", None),
        ("pretrain.init=", None),
        ("sft.init=/m #3", "/m #3"),
        ("data.doc.item.column=item: id", "item: id"),
        ("model.doc.text.init=/m #3", "/m #3"),
        ("pretrain.distillation.teacher=/t #3", "/t #3"),
        ("run.trackers=['a #3']", ("a #3",)),
    ],
)
def test_the_text_of_an_override_is_taken_as_it_is(path: Path, override: str, value: Any) -> None:
    others = ["pretrain.distillation.name=batch_kl"] if "teacher" in override else []
    config: Any = load_config(path, [override, *others])
    for part in override.partition("=")[0].split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    assert config == value


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("pretrain.steps=3 #4", "a # after a space begins a comment"),
        ("run.trackers=[a #3]", "a # after a space begins a comment"),
        ("run.dir=???", r"\?\?\? marks a value"),
        ("pretrain={steps: '???'}", r"\?\?\? marks a value"),
        ("run.dir='a", "has no YAML value"),
        ("run.dir=${", "has no YAML value"),
    ],
)
def test_an_override_has_neither_comments_nor_missing_values(path: Path, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["data.query={age: {type: numeric}}"], ["words", "age"]),
        (["data.query={}"], []),
        (["data.query={age: {type: numeric}}", "data.query={}", "data.query.sex.type=categorical"], ["sex"]),
        (["data={query: {}}"], []),
        (["data={lanes: 2, query: {age: {type: numeric}}}"], ["words", "age"]),
        (["data={query: {}}", "data={query: {age: {type: numeric}}}"], ["age"]),
    ],
)
def test_an_override_merges_with_a_mapping_and_an_empty_one_replaces_it(
    path: Path, overrides: list[str], names: list[str]
) -> None:
    content = yaml.safe_load(path.read_text())
    content["data"]["query"] = {"words": {"type": "text"}}
    path.write_text(yaml.safe_dump(content))
    assert list(read_config(path, overrides).data.query) == names


def test_overrides_apply_one_after_the_other(path: Path) -> None:
    """A later component keeps the keys that it has, a list can be changed by element, and no override the content."""
    triplet = ["pretrain.loss.name=triplet", "pretrain.loss.margin=0.3"]
    assert read_config(path, triplet).pretrain.loss.margin == 0.3
    assert read_config(path, triplet[::-1]).pretrain.loss.margin == 0.3
    assert read_config(path, [*triplet, "pretrain.loss.name=fps"]).pretrain.loss.name == "fps"
    assert read_config(path, [*triplet, "pretrain={loss: {name: fps}}"]).pretrain.loss.name == "fps"
    emptied = read_config(path, [*triplet, "pretrain={loss: {}}", "pretrain.loss.name=triplet"]).pretrain.loss
    assert emptied.margin == Triplet().margin != 0.3
    sources = ["data.mixture=[{dir: a, weight: 1}, {dir: b, weight: 2}]", "data.mixture[1].weight=3"]
    mixture = read_config(path, sources).data.mixture
    assert [(source.dir, source.weight) for source in mixture] == [("a", 1), ("b", 3)]
    content = OmegaConf.create({"data": {"event": {"price": {"type": "numeric"}}, "mixture": [{"dir": "a"}]}})
    before = OmegaConf.to_container(content)
    changed = overridden(content, ["data.mixture[0].dir=b", "data={event: {}}"], Config)
    assert OmegaConf.to_container(changed) == {"data": {"event": {}, "mixture": [{"dir": "b"}]}}
    assert OmegaConf.to_container(content) == before


@pytest.mark.parametrize(
    ("given", "beta"),
    [
        ([], "none"),
        (["model.score=cosine"], "none"),
        (["model.score=dot"], "document"),
        (["model.beta=auto", "model.score=dot"], "document"),
        (["model.beta=document"], "document"),
        (["model.score=dot", "model.beta=none"], "none"),
    ],
)
def test_the_bias_follows_the_score(path: Path, given: list[str], beta: str) -> None:
    """A written config, also one of an earlier version, has the value itself, and keeps it."""
    config = load_config(path, given)
    content = config.to_dict()
    assert config.model.beta == content["model"]["beta"] == beta
    for kept in ("document", "none"):
        content["model"]["beta"] = kept
        path.write_text(yaml.safe_dump(content))
        assert load_written_config(path).model.beta == kept


def test_keys_without_effect_are_refused(path: Path) -> None:
    texts = ["data.doc.title={type: text}", "data.query.words={type: text}", "model.share_text=true"]
    with pytest.raises(ConfigError, match=r"model\.doc\.text\.layers: got 3, needs 2, as model\.query\.text"):
        load_config(path, [*texts, "model.doc.text.layers=3"])
    for given in ("model.query.text.layers=3", "model={query: {text: {layers: 3}}, doc: {text: {layers: 3}}}"):
        load_config(path, [*texts, given])
    load_config(path, [*texts, "model.query.text={init: m, lora_rank: 4}", "model.doc.text.init=m"])
    load_config(path, [*texts[1:], "model.doc.text.layers=3"])
    hashed = "model.tables={hashes: 2, hash_rows: 20}"
    with pytest.raises(ConfigError, match=r"model\.tables\.hash_rows: got 20, needs 0 without .* hash_buckets"):
        load_config(path, [hashed])
    load_config(path, [hashed, "data.doc.item.hash_buckets=1000"])


def test_defaults_follow_the_encoder_and_the_pretraining(path: Path) -> None:
    """The rate of new weights would destroy a pretrained encoder; shorter vectors stay trained in both stages."""
    text = ["data.doc.title={type: text}", "sft={loss: {name: softmax}}"]
    init = "model.doc.text.init=m"
    for given, lr in (([], 1e-3), ([init], 5e-5), ([init, "model.doc.text.lora_rank=4"], 1e-3)):
        config = load_config(path, [*text, *given])
        assert [stage.optimizer.lr for stage in (config.pretrain, config.stage("sft"))] == [lr, lr]
    assert load_config(path, [init]).pretrain.optimizer.lr == 1e-3, "no text, no encoder"
    assert load_config(path, [*text, init, "pretrain.optimizer.lr=0.1"]).pretrain.optimizer.lr == 0.1
    widths = "pretrain.loss.widths=[16, 8]"
    for given, expected in (([], ()), ([widths], (16, 8)), ([widths, "sft.loss.widths=[]"], ())):
        assert load_config(path, [*text, *given]).stage("sft").loss.widths == expected


@pytest.mark.parametrize(
    ("override", "sampling"),
    [
        ("loss: {name: fps}", "corrected"),
        ("loss: {name: softmax}", "corrected"),
        ("sampling: {name: none}", "none"),
        ("sampling: {name: corrected}", "corrected"),
        ("negatives: {columns: catalogue}", "none"),
        ("loss: {name: softmax}, negatives: {in_batch: false, hard: 3}", "none"),
        ("loss: {name: pair_ce}", "none"),
    ],
)
def test_popular_documents_of_a_batch_are_corrected_where_queries_have_histories(
    path: Path, override: str, sampling: str
) -> None:
    """The default `sampling` corrects in-batch negatives if queries have histories."""
    stages = [f"pretrain={{{override}}}", f"sft={{{override}}}"]
    config = load_config(path, stages)
    assert [stage.sampling.name for stage in (config.pretrain, config.sft) if stage] == [sampling] * 2
    content = yaml.safe_load(path.read_text())
    content["data"]["query"] = {"words": {"type": "text"}}
    path.write_text(yaml.safe_dump(content))
    assert load_config(path, stages).pretrain.sampling.name == (sampling if "sampling" in override else "none")


def header_overrides(file: Path) -> list[list[str]]:
    """Return the override lines of a config's header: `#   key=value key=value …`, continued after a backslash."""
    header = file.read_text().split("\n\n")[0].replace("\\\n#", "")
    lines = [shlex.split(line[4:]) for line in header.splitlines() if line.startswith("#   ")]
    return [words for words in lines if all(re.match(r"[a-z_.]+=", word) for word in words)]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_shipped_configs_load_also_with_the_overrides_of_their_headers(file: Path) -> None:
    plain = load_config(file)
    given = [load_config(file, overrides) for overrides in header_overrides(file)]
    if plain.model.share_text:  # the text configs: from scratch, and with a light query tower
        name = plain.run.dir
        assert [config.run.dir for config in given] == [f"{name}_scratch", f"{name}_light"]
        scratch, light = given
        assert scratch.data.dir == f"{plain.data.dir}_scratch" and scratch.data.tokenizer.path is None
        assert scratch.model.query.text.hidden == scratch.model.dim  # the residual's width
        assert light.data == plain.data and light.model.query.text.keep_layers == 2
    assert len({config.run.dir for config in [plain, *given]}) == 1 + len(given)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.rows_global=4", ["pretrain.rows_global=4", "; use 8"]),
        ("pretrain.rows_globl=1", ["pretrain.rows_globl", "did you mean pretrain.rows_global?"]),
        ("pretrain.rows_global=many", ["pretrain.rows_global", "many"]),
        ("pretrain.rows_global=1001", ["pretrain.rows_global=1001", "data.lanes=8", "1000 or 1008"]),
        ("pretrain.rows_global=-4", ["pretrain.rows_global", "got -4", "at least 1"]),
        ("pretrain.loss.name=fsp", ["pretrain.loss.name", "fsp", "one of fps"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "4", "at least 0 and at most 3"]),
        ("run.trackers={a: 1}", ["run.trackers: got {'a': 1}, needs a list"]),
        ("run.trackers[0]=x", ["run.trackers: got {'0': 'x'}, needs a list"]),
        ("run.trackers=[[a]]", ["run.trackers[0]: got ['a'], needs a text"]),
        ("model.tables.rows=[{a: 1}]", ["model.tables.rows[0]: got {'a': 1}, needs a text"]),
        ("data.event=[a]", ["data.event: got ['a'], needs a mapping"]),
        ("pretrain.loss.name=[fps]", ["pretrain.loss.name: got [fps], needs one of fps, softmax"]),
        ("pretrain.optimizer.betas={}", ["pretrain.optimizer.betas: got {}, needs a list"]),
        ("pretrain.optimizer.betas=[0.9]", ["pretrain.optimizer.betas: got [0.9], needs 2 values"]),
        ("engine={zero_stage: 0, precision: bf16_pure}", ["engine.zero_stage", "1, 2 or 3 with engine.precision=bf16"]),
        (
            "engine={chunk_tokens: 400, precision: bf16_pure}",
            ["engine.chunk_tokens: got 400", "0 with engine.precision=bf16_pure, which adds gradients in bfloat16"],
        ),
        ("engine={zero_stage: 0, offload_optimizer: true}", ["engine.zero_stage", "1, 2 or 3", "offload_optimizer"]),
        ("engine={zero_stage: 3, compile: true}", ["engine.compile: got true", "false with engine.zero_stage=3"]),
        ("data.query.history.of=itme", ["data.query.history.of", "itme", "item"]),
        ("data.query.history.of=tags", ["data.query.history.of", "tags", "single-valued"]),
        ("model.alpha_init=0", ["model.alpha_init", "above 0"]),
        ("pretrain.negatives.mining={first: 9, last: 9}", ["pretrain.negatives.mining", "first < last"]),
        (
            "pretrain={loss: {name: softmax}, negatives: {in_batch: false, hard: 0}}",
            ["pretrain.negatives.hard", "at least 1"],
        ),
        ("pretrain.negatives.in_batch=false", ["pretrain.negatives.in_batch", "fps"]),
        (
            "sft.negatives.mining={file: x.npy, every_steps: 3}",
            ["sft.negatives.mining.every_steps: got 3, needs 0 with sft.negatives.mining.file"],
        ),
        (
            "sft.negatives.mining.teacher_margin=0.5",
            ["sft.negatives.mining.teacher_margin: got 0.5, needs sft.negatives.mining.file, with a teacher"],
        ),
        (
            "pretrain.negatives.mining.uniform=true",
            ["pretrain.negatives.hard: got 0, needs at least 1 with pretrain.negatives.mining.unif"],
        ),
        (
            "pretrain={negatives: {hard: 2, mining: {uniform: true, file: x.npy}}, loss: {name: softmax}}",
            ["pretrain.negatives.mining.file: got x.npy, needs none with pretrain.negatives.mining.uniform=true"],
        ),
        (
            "sft.distillation.name=kl",
            ["sft.negatives.mining.file: got None, needs a file with a teacher's scores"],
        ),
        (
            "sft={negatives: {mining: {file: x.npy}}, distillation: {name: kl}}",
            ["sft.negatives.hard: got 0, needs at least 1"],
        ),
        (
            "sft.distillation.name=batch_kl",
            ["required key sft.distillation.teacher is missing"],
        ),
        (
            "sft.distillation.teacher=x",
            ["sft.distillation.name: got None, needs one of kl, margin_mse, batch_kl"],
        ),
        (
            "sft={distillation: {teacher: x, name: batch_kl}, loss: {name: fps}, negatives: {columns: catalogue}}",
            ["sft.negatives.columns: got catalogue, needs batch with sft.distillation.name=batch_kl"],
        ),
        ("pretrain.loss={name: pair_ce, direction: both}", ["unknown key pretrain.loss.direction", "pair_ce has"]),
        ("pretrain={loss: {name: pair_ce}, negatives: {uniform: 9}}", ["pretrain.negatives.uniform", "9"]),
        ("pretrain.loss.mask_history=true", ["mask_history"]),
        (
            "pretrain={negatives: {columns: catalogue}, loss: {name: softmax}}",
            ["pretrain.negatives.columns", "batch with softmax"],
        ),
        (
            "pretrain={negatives: {columns: catalogue}, loss: {direction: both}}",
            ["pretrain.loss.direction: got both, needs q2d with pretrain.negatives.columns=catalogue"],
        ),
        (
            "pretrain={negatives: {columns: catalogue}, sampling: {name: corrected}}",
            ["pretrain.sampling.name: got corrected, needs none", "every document is exactly one column"],
        ),
        (
            "pretrain={negatives: {columns: catalogue, uniform: 9}}",
            ["pretrain.negatives.uniform: got 9, needs 0"],
        ),
        (
            "sft={negatives: {columns: catalogue, hard: 3}}",
            ["sft.negatives.hard: got 3, needs 0", "sft.negatives.columns"],
        ),
        (
            "pretrain={sampling: {name: none, frequency: streaming}}",
            ["unknown key pretrain.sampling.frequency: none has"],
        ),
        (
            "sft={loss: {name: pair_ce}, negatives: {in_batch: false, hard: 3}, sampling: {name: corrected}}",
            ["sft.sampling", "in_batch=true"],
        ),
        (
            "pretrain={sampling: {name: corrected, frequency_buckets: 0}}",
            ["pretrain.sampling.frequency_buckets", "got 0"],
        ),
        (
            "sft={loss: {name: pair_ce, position_bias: 3},"
            " negatives: {in_batch: true, hard: 3, mining: {file: x.npy}}}",
            ["sft.loss.position_bias: got 3, needs 0, or negatives that were shown"],
        ),
        (
            "pretrain.loss.position_bias=3",
            ["pretrain.loss.position_bias: got 3, needs 0, or negatives that"],
        ),
        ("run.dir=s3://key:secret@a/b", ["run.dir", "s3://", "a folder of a file system", "bigdssm mirror_run"]),
        ("run.seed=-1", ["run.seed", "got -1"]),
        ("model.doc.mlp=[{a: 1}]", ["model.doc.mlp[0]: got {'a': 1}, needs an integer, at least 1"]),
        ("pretrain.loss.widths=[{a: 1}]", ["pretrain.loss.widths[0]: got {'a': 1}, needs an integer"]),
        ("data.exclude_seen=[1]", ["data.exclude_seen: got [1], needs true or false or a text"]),
        ("model.doc.mlp=[[1]]", ["model.doc.mlp[0]", "got [1]", "needs an integer"]),
        ("data.num_workers=-1", ["data.num_workers", "at least 0"]),
        ("pretrain.log_every_steps=0", ["pretrain.log_every_steps", "at least 1"]),
        ("sft.max_skipped_steps=0", ["sft.max_skipped_steps", "at least 1"]),
        ("pretrain.steps=-1", ["pretrain.steps", "at least 0"]),
        ("pretrain.optimizer.lr=-1", ["pretrain.optimizer.lr", "at least 0"]),
        ("pretrain.optimizer.betas=[0.9, 1.0]", ["pretrain.optimizer.betas", "1.0"]),
        ("sft.optimizer.gradient_clipping=-1", ["sft.optimizer.gradient_clipping", "at least 0"]),
        ("pretrain.loss.position_bias_lr=-1", ["pretrain.loss.position_bias_lr", "at least 0"]),
        ("pretrain.loss.widths=[48, 48]", ["pretrain.loss.widths", "[48, 48]", "distinct numbers"]),
        ("pretrain.loss.widths=[9999]", ["pretrain.loss.widths", "below model.dim"]),
        ("pretrain.save_every_minutes=-1", ["pretrain.save_every_minutes", "at least 0"]),
        ("pretrain.keep_checkpoints=0", ["pretrain.keep_checkpoints", "at least 1"]),
        ("nothing", ["nothing", "key=value"]),
    ],
)
def test_bad_values_are_named(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["data.webdataset=x.tar"],
            "data.webdataset: got x.tar, needs none with pretrain.negatives.columns=catalogue: rows",
        ),
        (
            ["model.doc.dropout=0.1"],
            "model.doc.dropout: got 0.1, needs 0.0 with pretrain.negatives.columns=catalogue: a",
        ),
        (["model.doc.text.dropout=0.1"], "model.doc.text.dropout: got 0.1, needs 0.0"),
        (["model.share_text=true", "model.query.text.dropout=0.1"], "model.query.text.dropout: got 0.1, needs 0.0"),
    ],
)
def test_the_catalogue_as_columns_needs_documents_that_are_the_same_on_all_ranks(
    path: Path, overrides: list[str], words: str
) -> None:
    texts = ["data.doc.words={type: text}", "data.query.words={type: text}"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["pretrain.negatives.columns=catalogue", *texts, *overrides])
    assert words in str(caught.value)
    load_config(path, [*texts, *overrides])


def test_a_feature_of_requests_is_named_once(path: Path) -> None:
    event = "data.event={action: {type: categorical}, device: {type: categorical}}"
    twice = "data.request=[action, device, action]"
    with pytest.raises(ConfigError, match=r"data.request: got action more than once, needs each feature once"):
        load_config(path, [event, twice])
    assert load_config(path, [event, "data.request=[action, device]"]).data.request == ("action", "device")


def test_contents_of_items_need_more_than_an_id(path: Path) -> None:
    both = ["model.query.history.items=both"]
    assert load_config(path, both).model.query.history.items == "both"
    content = yaml.safe_load(path.read_text())
    del content["data"]["doc"]["tags"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"model.query.history.items: got both, needs id without a history, and"):
        load_config(path, both)


def test_a_period_of_contents_needs_histories_that_read_them(path: Path) -> None:
    period = "pretrain.refresh_contents_every_steps=7"
    assert load_config(path, [period, "model.query.history.items=both"]).pretrain.refresh_contents_every_steps == 7
    words = r"pretrain.refresh_contents_every_steps: got 7, needs 0 with model.query.history.items=id"
    with pytest.raises(ConfigError, match=words):
        load_config(path, [period])


def test_existing_hard_negatives_require_the_whole_dataset(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft.negatives.mining.file: got x.npy"):
        load_config(path, ["sft.negatives.mining.file=x.npy", "data.from_partition=day2"])


def test_a_missing_file_a_missing_key_and_broken_yaml_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no.yaml")
    path.write_text("run: {dir: x}\n")
    with pytest.raises(ConfigError, match=r"data\.dir|data.query"):
        load_config(path)
    path.write_text("run: {dir: [\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path)


def test_a_missing_stage_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match="`sft:`"):
        load_config(path).stage("sft")


def test_first_difference_names_the_deepest_key() -> None:
    a = {"x": {"y": {"z": 1}, "same": [1]}}
    assert first_difference(a, {"x": {"y": {"z": 2}, "same": [1]}}) == "x.y.z was 1, is 2"
    assert first_difference(a, a) is None


@dataclass(frozen=True)
class Muon(AdamW):
    """An optimizer of a plugin, with a key of its own."""

    name: str = "muon"
    momentum: float = bounded(0.95, 0, below=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("pretrain.optimizer.momentum=0.5", "unknown key pretrain.optimizer.momentum: adamw has name, lr, "),
        ("pretrain.optimizer.beta=[0.9, 0.9]", "did you mean pretrain.optimizer.betas?"),
        ("sft.optimizer.name=adamv", "sft.optimizer.name: got adamv, needs one of adamw, or an optimizer"),
        ("pretrain.optimizer.name=null", "pretrain.optimizer.name: got None"),
        ("pretrain.optimizer.name=${nobody}", "pretrain.optimizer.name: Interpolation key 'nobody' not found"),
    ],
)
def test_an_optimizer_has_keys_of_its_own(
    path: Path, override: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as registered:
        registered.setitem(OPTIMIZERS.classes, "muon", Muon)  # a removed name, which a plugin may have
        given = ["sft.optimizer={name: muon, momentum: 0.5}", "sft.optimizer.lr=${pretrain.optimizer.lr}"]
        muon = load_config(path, given)
        assert muon.sft is not None and muon.pretrain.optimizer == AdamW(**asdict(muon.pretrain.optimizer))
        assert muon.sft.optimizer == Muon(momentum=0.5, lr=muon.pretrain.optimizer.lr)
        assert config_of(muon) == muon
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load_config(path, [override])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "model.query.history={block: gated, filter_share: 1}",
            "unknown key model.query.history.filter_share: gated has",
        ),
        (
            "model.query.history={block: lowpass, positions: far}",
            "model.query.history.positions: got 'far', needs one of age, ",
        ),
        (
            "model.query.history.block=lstm",
            "model.query.history.block: got lstm, needs one of sasrec, gated, lowpass, or",
        ),
        (
            "model.doc.text.type=bag",
            "model.doc.text.type: got bag, needs one of transformer, or a text encoder whose module",
        ),
        ("model.doc.text.width=8", "unknown key model.doc.text.width: transformer has type, dropout, init"),
        (
            "model.doc.text.keep_layers=2",
            "model.doc.text.keep_layers: got 2, needs model.doc.text.init; without it, set `layers`",
        ),
        (
            "model.doc.text={hidden: 9, heads: 2}",
            "model.doc.text.hidden: got 9, needs a multiple of model.doc.text.heads",
        ),
    ],
)
def test_blocks_and_text_encoders_have_keys_of_their_own(path: Path, override: str, reason: str) -> None:
    lowpass = load_config(path, ["model.query.history.block=lowpass"]).model.query.history
    assert lowpass == LowPass() and lowpass.filter_share == 0.7
    with pytest.raises(ConfigError, match=re.escape(reason)):
        load_config(path, [override])


def test_reading_a_config_imports_no_torch(path: Path) -> None:
    script = "import sys; from bigdssm.config import load_config"
    script += f"; assert load_config({str(path)!r}, ['sft.optimizer.name=adamw']).sft.optimizer.eps == 1e-8"
    script += "; print({'torch', 'deepspeed', 'faiss'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
