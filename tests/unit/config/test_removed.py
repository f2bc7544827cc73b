"""Keys of earlier versions: dropped from written configs at their former defaults, refused otherwise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bigdssm
from bigdssm.checkpoints.checkpoint import MANIFEST
from bigdssm.checkpoints.model_folder import META_FILE, load_checkpoint_model, load_model_folder, save_model_folder
from bigdssm.config import Config, config_from, load_config, load_written_config
from bigdssm.config.removed import REMOVED_KEYS, REMOVED_VALUES, RemovedValue, check_removed, without_former_defaults
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.models import new_model
from bigdssm.training.start import check_folder
from bigdssm.utils.hashing import json_checksum
from tests.conftest import TinyDataset

KEYS = sorted(REMOVED_KEYS)


def with_key(config: Config, key: str, value: Any) -> dict[str, Any]:
    """Return the content of a config that an earlier version wrote."""
    return set_key(config.to_dict(), key, value)


def set_key(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    section = content
    *sections, name = key.split(".")
    for part in sections:
        section = section[part]
    section[name] = value
    return content


@pytest.fixture(scope="module")
def config(tiny_pairs: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A config with every section."""
    run_dir = tmp_path_factory.mktemp("run")
    return load_config(tiny_pairs.config, [f"run.dir={run_dir}", "sft.rows_global=64"])


@pytest.mark.parametrize("key", KEYS)
def test_a_former_default_in_a_written_config_is_dropped(key: str, config: Config, tmp_path: Path) -> None:
    """A run folder's file, and the content of a checkpoint, which stays as it is."""
    content = with_key(config, key, REMOVED_KEYS[key].default)
    written = copy.deepcopy(content)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_written_config(path) == config == config_from(tmp_path / "manifest.json", content)
    assert content == written
    assert without_former_defaults(content) == config.to_dict()


@pytest.mark.parametrize("key", KEYS)
def test_another_value_in_a_written_config_is_refused(key: str, config: Config, tmp_path: Path) -> None:
    content = with_key(config, key, 9)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    expected = f"{path}: {key}: got 9, needs no such key, which was removed: {REMOVED_KEYS[key].alternative}"
    for read in (load_written_config, lambda source: config_from(source, content)):
        with pytest.raises(ConfigError) as refused:
            read(path)
        assert str(refused.value) == expected
    assert without_former_defaults(content) == content


@pytest.mark.parametrize("key", KEYS)
def test_a_written_config_can_be_given_again(key: str, config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(with_key(config, key, REMOVED_KEYS[key].default)))
    assert load_config(path) == config
    path.write_text(yaml.safe_dump(with_key(config, key, 9)))
    with pytest.raises(ConfigError, match=f"{path}: {key}: got 9, needs no such key, which was removed: "):
        load_config(path)


@pytest.mark.parametrize("key", KEYS)
def test_a_command_line_has_no_removed_key(key: str, config: Config, tmp_path: Path) -> None:
    default = REMOVED_KEYS[key].default
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    with pytest.raises(ConfigError) as refused:
        load_config(path, [f"{key}={json.dumps(default)}"])
    assert str(refused.value).startswith(f"{path}: {key}: got ")
    assert "needs no such key, which was removed: " in str(refused.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_stage_folder_of_an_earlier_version_is_resumed(key: str, config: Config) -> None:
    folder = config.stage_dir("pretrain")
    folder.mkdir(exist_ok=True)
    written = folder / "config.yaml"
    written.write_text(yaml.safe_dump(with_key(config, key, REMOVED_KEYS[key].default)))
    check_folder(config, "pretrain", resume=True)
    written.write_text(yaml.safe_dump(with_key(config, key, 9)))
    with pytest.raises(CheckpointError, match=f"cannot be compared with the run's: {key}: got 9, needs no such key"):
        check_folder(config, "pretrain", resume=True)


@pytest.mark.parametrize("key", KEYS)
def test_a_model_folder_of_an_earlier_version_loads(
    key: str, config: Config, tiny_pairs: TinyDataset, tmp_path: Path
) -> None:
    dataset = Dataset.open(tiny_pairs.dir)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    save_model_folder(tmp_path / "best", model, config, dataset.schema, dataset.tokenizer_dir, {"stage": "pretrain"})

    def write(content: dict[str, Any]) -> None:
        """Write the config as an earlier version did, with the checksum of its model section."""
        (tmp_path / "best" / "config.yaml").write_text(yaml.safe_dump(content))
        file = tmp_path / "best" / META_FILE
        meta = json.loads(file.read_text())
        file.write_text(json.dumps({**meta, "config_checksum": json_checksum([content["model"], ()])}))

    write(with_key(config, key, REMOVED_KEYS[key].default))
    assert load_model_folder(tmp_path / "best").config == config
    write(with_key(config, key, 9))
    with pytest.raises(CheckpointError, match=f"{key}: got 9, needs no such key"):
        load_model_folder(tmp_path / "best")


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_is_resumed(tiny_pairs: TinyDataset, tmp_path: Path) -> None:
    """The run continues as one that this version began; a checkpoint with another value is refused."""
    short = ["run.trackers=[]", "pretrain.rows_global=64", "engine.chunk_tokens=200"]
    current, begun = ([*short, f"run.dir={tmp_path / name}"] for name in ("current", "begun"))
    for run in (current, begun):
        bigdssm.pretrain(tiny_pairs.config, [*run, "pretrain.steps=2"])
    checkpoint = tmp_path / "begun" / "pretrain" / "checkpoints" / "step-00000002"

    def write(values: dict[str, Any]) -> None:
        config = load_config(tiny_pairs.config, [*begun, "pretrain.steps=2"])
        content = config.to_dict()
        for key in KEYS:
            if not key.startswith("sft."):
                content = set_key(content, key, values.get(key, REMOVED_KEYS[key].default))
        (tmp_path / "begun" / "pretrain" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        del manifest["checksum"]
        manifest["state"]["config"] = content
        (checkpoint / MANIFEST).write_text(json.dumps({"checksum": json_checksum(manifest), **manifest}))

    for key in KEYS:
        if not key.startswith("sft."):
            write({key: 9})
            with pytest.raises(CheckpointError, match=f"cannot be compared with this one: .*{key}: got 9, needs no"):
                bigdssm.pretrain(tiny_pairs.config, [*begun, "pretrain.steps=4"], resume=True)
    write({})
    for run in (current, begun):
        bigdssm.pretrain(tiny_pairs.config, [*run, "pretrain.steps=4"], resume=True)
    ends = (tmp_path / name / "pretrain" / "checkpoints" / "step-00000004" for name in ("current", "begun"))
    first, second = (load_checkpoint_model(path).model.state_dict() for path in ends)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("removed", REMOVED_VALUES, ids=lambda removed: f"{removed.key}-{removed.value}")
def test_a_removed_value_is_refused_with_its_alternative(
    removed: RemovedValue, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a written config and on the command line; a plugin may have a component of that name."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(with_key(config, removed.key, removed.value)))
    expected = f"{path}: {removed.key}: got {removed.value}, which was removed: {removed.alternative}"
    for read in (load_written_config, load_config):
        with pytest.raises(ConfigError) as refused:
            read(path)
        assert str(refused.value) == expected
    path.write_text(yaml.safe_dump(config.to_dict()))
    with pytest.raises(ConfigError) as refused:
        load_config(path, [f"{removed.key}={removed.value}"])
    assert str(refused.value) == expected
    if removed.registry is None:
        return
    assert removed.value not in removed.registry.names()
    monkeypatch.setitem(removed.registry.classes, removed.value, type(section_at(config, removed.key)))
    check_removed(with_key(config, removed.key, removed.value))


def section_at(config: Config, key: str) -> Any:
    """Return the component whose name is the dotted `key`."""
    section: Any = config
    for part in key.split(".")[:-1]:
        section = getattr(section, part)
    return section


def test_removed_keys_are_no_keys() -> None:
    for key in KEYS:
        content: Any = Config().to_dict() | {"sft": Config().to_dict()["pretrain"]}
        *sections, name = key.split(".")
        for part in sections:
            content = content[part]
        assert name not in content
