"""LoRA adapters: they alone are trained, change the vectors, are merged once, and are saved alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigdssm.checkpoints.model_folder import (
    ModelFolder,
    load_initial_model,
    load_model_folder,
    model_checksum,
    save_model_folder,
)
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.export.adapter_format import AdapterExport, without_adapters
from bigdssm.export.convert import ExportSource, export
from bigdssm.export.formats import Probe, largest_difference
from bigdssm.models import new_model
from bigdssm.training.checks import model_difference
from tests.encoders import LORA, write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("lora"), "qwen3")


def folder_of(pairs: Path, overrides: list[str], scale: float) -> ModelFolder:
    config = load_config(pairs, overrides)
    dataset = Dataset.open(config.data.dir)
    torch.manual_seed(0)
    model = new_model(config.model, dataset.schema, dataset.vocab_size).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # zero at first
                parameter.add_(scale * torch.randn_like(parameter))
    return ModelFolder(model, config, dataset.schema, dataset.tokenizer_dir, {}, "")


def test_the_adapters_alone_are_trained(pairs: Path) -> None:
    model = folder_of(pairs, LORA, 0.0).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("text.")} == {n for n in model.state_dict() if ".lora_" in n}
    some = folder_of(pairs, [*LORA, *(f"model.{s}.text.lora_modules=[q_proj,v_proj]" for s in ("query", "doc"))], 0.0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in some.model.state_dict() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_new_adapters_change_nothing_and_trained_ones_are_merged_once(pairs: Path) -> None:
    base, new, trained = (folder_of(pairs, *args) for args in (([], 0.0), (LORA, 0.0), (LORA, 0.3)))
    vectors = [Probe(folder).vectors for folder in (base, new, trained, without_adapters(trained))]
    for side in ("query", "doc"):
        plain, unchanged, adapted, merged = (of[side] for of in vectors)  # type: ignore[index]
        assert largest_difference(unchanged, plain) < 1e-6 < 0.01 < largest_difference(adapted, plain)
        assert largest_difference(merged, adapted) < 1e-5
    merged_names = set(without_adapters(trained).model.state_dict())
    assert merged_names == set(base.model.state_dict())


def test_an_adapter_is_saved_alone(pairs: Path, tmp_path: Path) -> None:
    source = ExportSource(folder_of(pairs, LORA, 0.3), "trained")
    export(source, tmp_path / "adapter", "adapter")
    export(source, tmp_path / "model", "model")
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("*.safetensors")) for n in ("adapter", "model")]
    assert sizes[0] < sizes[1] / 2
    kept = [*LORA, *(f"model.{side}.text.keep_layers=2" for side in ("query", "doc"))]
    assert "num_hidden_layers=2" in AdapterExport().loading(folder_of(pairs, kept, 0.0), "adapter")
    with pytest.raises(ConfigError, match="has no adapters"):
        export(ExportSource(folder_of(pairs, [], 0.0), "plain"), tmp_path / "none", "adapter")


def test_frozen_weights_of_a_loaded_model_stay_in_its_file(pairs: Path, tmp_path: Path) -> None:
    source = folder_of(pairs, LORA, 0.3)
    save_model_folder(tmp_path / "model", source.model, source.config, source.schema, source.tokenizer_dir, {})
    loaded = load_model_folder(tmp_path / "model")
    assert loaded.checksum == model_checksum(loaded.model, loaded.config, loaded.schema, loaded.tokenizer_dir, {})
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model/frozen" in line]
    parts = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
    frozen = loaded.model.frozen_weights()
    assert len(frozen) > 20
    for name, weight in frozen.items():
        assert any(first <= weight.data_ptr() < end for first, end in parts), name
    assert torch.equal(Probe(loaded).vectors["query"], Probe(source).vectors["query"])  # with its buffers


@pytest.mark.parametrize(
    ("shared", "adapters", "adapted"),
    [
        (True, LORA[:1], {"shared"}),
        (False, LORA[:1], {"query"}),
        (False, LORA[1:], {"doc"}),
        (False, LORA, {"query", "doc"}),
    ],
)
def test_a_model_trained_without_adapters_gets_them(
    pairs: Path, tmp_path: Path, shared: bool, adapters: list[str], adapted: set[str]
) -> None:
    overrides = [f"model.share_text={str(shared).lower()}"]
    source = folder_of(pairs, overrides, 0.0)
    save_model_folder(tmp_path / "model", source.model, source.config, source.schema, source.tokenizer_dir, {})
    config = load_config(pairs, [*overrides, *adapters, "model.query.text.lora_dropout=0.5"]).model
    started = load_initial_model(tmp_path / "model", config)
    assert model_difference(started.config, replace(started.config, model=config)) is None
    trained = {name for name, parameter in started.model.named_parameters() if parameter.requires_grad}
    for key in started.model.text:
        of_key = {name for name in trained if name.startswith(f"text.{key}.")}
        assert all((".lora_" in name) == (key in adapted) for name in of_key) and of_key
    assert not any(module.training for module in started.model.modules())
    for side in ("query", "doc"):
        assert largest_difference(Probe(started).vectors[side], Probe(source).vectors[side]) < 1e-6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.query.text.lora_rank=4", "model.query.text.init=null"],
            "lora_rank: got 4, needs model.query.text.init",
        ),
        ([*LORA, "model.query.text.lora_modules=[nothing]"], r"text.lora_modules=\['nothing'\]"),
    ],
)
def test_adapters_that_are_refused(pairs: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder_of(pairs, overrides, 0.0)
