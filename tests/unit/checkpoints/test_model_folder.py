"""A model folder is self-contained, restores the model, and does not load if damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import Config, DataConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.features import Vocabulary
from bigdssm.loader.batch import Collator
from bigdssm.models import DualEncoder, new_model
from tests.unit.conftest import random_model


def outputs(model: DualEncoder, dataset: Dataset) -> list[torch.Tensor]:
    rows = next(dataset.iterate("test", 9))
    batch = Collator(dataset.schema, dataset.catalogue)(rows)
    with torch.no_grad():
        encoded = model(query=batch.query, doc=batch.doc)
    return [encoded.U, encoded.W, encoded.beta, encoded.alpha]


def test_round_trip(model: DualEncoder, model_dir: Path, config: Config, dataset: Dataset) -> None:
    folder = load_model_folder(model_dir)
    for ours, theirs in zip(outputs(folder.model, dataset), outputs(model, dataset), strict=True):
        assert torch.equal(ours, theirs)
    assert folder.config == config
    assert folder.model.config == config.model
    assert folder.schema == dataset.schema
    assert folder.provenance == {"stage": "pretrain", "step": 3}
    assert folder.tokenizer_dir is not None
    assert not folder.model.training
    assert folder.view(dataset) is dataset
    names = {path.name for path in model_dir.iterdir()}
    assert names == {
        "config.yaml",
        "schema.json",
        "vocabularies",
        "tokenizer",
        "text",
        "model.safetensors",
        "bigdssm.json",
    }


def test_weights_of_a_sharded_model_come_from_state(
    model: DualEncoder, config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hollow = new_model(config.model, dataset.schema, dataset.vocab_size)
    save_model_folder(tmp_path / "m", hollow, config, dataset.schema, dataset.tokenizer_dir, {}, state=state)
    assert torch.equal(outputs(load_model_folder(tmp_path / "m").model, dataset)[0], outputs(model, dataset)[0])


def small_bert(folder: Path, layers: int) -> Path:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 12, "num_hidden_layers": layers, "num_attention_heads": 3, "intermediate_size": 20}
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=33, **sizes)).save_pretrained(folder)
    return folder


def test_the_pretrained_folder_of_a_text_encoder_may_go(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    pretrained = small_bert(tmp_path / "bert", layers=2)
    doc = replace(config.model.doc, text=replace(config.model.doc.text, init=str(pretrained)))
    started = replace(config, model=replace(config.model, doc=doc))
    model = new_model(started.model, dataset.schema, dataset.vocab_size).eval()
    save_model_folder(tmp_path / "m", model, started, dataset.schema, dataset.tokenizer_dir, {})
    shutil.rmtree(pretrained)
    loaded = load_model_folder(tmp_path / "m")
    assert loaded.config == started
    assert torch.equal(outputs(loaded.model, dataset)[1], outputs(model, dataset)[1])


def test_a_light_query_tower_comes_back_light(tiny_pairs: Any, tmp_path: Path) -> None:
    pretrained, dataset = small_bert(tmp_path / "bert", layers=3), Dataset.open(tiny_pairs.dir)
    overrides = [
        "dim=12", "beta=document", "share_text=false", "query.text.keep_layers=2", "query.residual=query",
        "doc.residual=text",
        *(f"{side}.text.init={pretrained}" for side in ("query", "doc")),
    ]  # fmt: skip
    config = load_config(tiny_pairs.config, [f"model.{override}" for override in overrides])
    model = random_model(config, dataset, seed=4)
    save_model_folder(tmp_path / "m", model, config, dataset.schema, dataset.tokenizer_dir, {})
    shutil.rmtree(pretrained)
    loaded = load_model_folder(tmp_path / "m").model
    for ours, theirs in zip(outputs(loaded, dataset), outputs(model, dataset), strict=True):
        assert torch.equal(ours, theirs)
    assert {side: len(encoder.transformer.encoder.layer) for side, encoder in loaded.text.items()} == {
        "query": 2,
        "doc": 3,
    }


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "\\${run.seed}", "a ${b} c"])
def test_the_config_of_a_folder_is_data(
    config: Config, dataset: Dataset, model: DualEncoder, text: str, tmp_path: Path
) -> None:
    """A folder's config must not read environment variables of the process that opens it."""
    said = replace(config, data=replace(config.data, dir=text))
    save_model_folder(tmp_path / "m", model, said, dataset.schema, dataset.tokenizer_dir, {})
    assert load_model_folder(tmp_path / "m").config.data.dir == text


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "?", "a\\${b}"])
def test_the_declaration_of_a_feature_is_data_once_the_config_is_read(text: str) -> None:
    data = DataConfig(dir="d", doc={"tags": {"type": "categorical", "multi": True, "separator": text}})  # type: ignore[dict-item]
    assert data.doc["tags"].declaration()["separator"] == text


def test_the_mark_of_a_missing_value_is_refused_in_a_feature() -> None:
    with pytest.raises(ConfigError, match=r"data\.doc\.tags\.separator is missing; give it a value"):
        DataConfig(dir="d", doc={"tags": {"type": "categorical", "multi": True, "separator": "???"}})  # type: ignore[dict-item]


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copied"))


def test_a_flipped_bit_of_a_model_folder_is_detected(copied: Path) -> None:
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model_folder(copied)


VOCABULARY = "vocabularies/doc.genres.000000.arrow"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "schema.json", VOCABULARY, "tokenizer/tokenizer.json", "text/doc/config.json"]
)
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model_folder(copied)


def test_damaged_descriptions(copied: Path) -> None:
    meta = json.loads((copied / "bigdssm.json").read_text())
    for content, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({**meta, "format": 99}), "format 99"),
        (json.dumps({"format": 1}), "lacks"),
        (
            json.dumps({**meta, "format": 2}),
            "of format 2, this version reads format 1; train again",
        ),
    ):
        (copied / "bigdssm.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load_model_folder(copied)
    (copied / "bigdssm.json").write_text(json.dumps(meta))
    load_model_folder(copied)
    (copied / "config.yaml").write_text("run: [")
    with pytest.raises(CheckpointError, match="does not load"):
        load_model_folder(copied)
    for folder in (copied / "nothing", copied / "schema.json"):
        with pytest.raises(CheckpointError, match="is not a model folder"):
            load_model_folder(folder)


def test_weights_of_another_model_do_not_fit(copied: Path) -> None:
    import xxhash

    tensors = load_file(copied / "model.safetensors")
    tensors.pop("log_alpha")
    save_file(tensors, copied / "model.safetensors")
    meta = json.loads((copied / "bigdssm.json").read_text())
    meta["checksums"]["model.safetensors"] = xxhash.xxh3_128_hexdigest((copied / "model.safetensors").read_bytes())
    (copied / "bigdssm.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="log_alpha"):
        load_model_folder(copied)


def test_a_dataset_of_another_schema_is_refused(model_dir: Path, dataset: Dataset) -> None:
    folder = load_model_folder(model_dir)
    grown = replace(dataset.schema.doc["genres"], vocabulary=Vocabulary.of(("z",)))
    other = replace(folder, schema=Schema(dataset.schema.query, {**dataset.schema.doc, "genres": grown}))
    with pytest.raises(CheckpointError, match="the vocabulary or normalization differs"):
        other.view(dataset)
    other = replace(folder, schema=Schema({}, dataset.schema.doc))
    with pytest.raises(CheckpointError, match="query features"):
        other.view(dataset)


def test_another_column_of_titles_is_no_other_schema(model_dir: Path, dataset: Dataset) -> None:
    folder = load_model_folder(model_dir)
    other = replace(folder, schema=replace(folder.schema, title="another"))
    assert other.schema != folder.schema
    view = other.view(dataset)
    assert view.schema == folder.schema, "with the dataset's title"
    assert view.catalogue.titles(np.arange(2)) == dataset.catalogue.titles(np.arange(2))


def test_only_model_folders_are_replaced(model: DualEncoder, config: Config, dataset: Dataset, tmp_path: Path) -> None:
    arguments = (model, config, dataset.schema, dataset.tokenizer_dir)
    (tmp_path / "precious.txt").write_text("do not touch")
    for folder in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(CheckpointError, match="not a model folder"):
            save_model_folder(folder, *arguments, {})
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    save_model_folder(tmp_path / "m", *arguments, {"step": 1})
    save_model_folder(tmp_path / "m", *arguments, {"step": 2})
    assert load_model_folder(tmp_path / "m").provenance == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "precious.txt"]
