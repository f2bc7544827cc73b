"""Model folders with valid checksums and invalid content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from safetensors.torch import load_file, save_file

from bigdssm.checkpoints import model_folder
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.dataset.partition import read_json
from bigdssm.dataset.schema import Schema
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.export.onnx_model import read_export
from bigdssm.features.numeric import Numeric
from bigdssm.retrieval.vectors import read_meta
from bigdssm.utils.hashing import json_checksum

DEEP = "[" * 100_000


@pytest.fixture
def copied(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "copied"))


def sealed(folder: Path) -> None:
    """Update a folder's checksums, as an attacker would."""
    meta = json.loads((folder / "bigdssm.json").read_text())
    for name in meta["checksums"]:
        meta["checksums"][name] = xxhash.xxh3_128_hexdigest((folder / name).read_bytes())
    (folder / "bigdssm.json").write_text(json.dumps(meta))


def refused(folder: Path, message: str) -> None:
    sealed(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model_folder(folder)
    assert "\n" not in str(error.value)


def in_schema(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        content = json.loads((folder / "schema.json").read_text())
        change(content)
        (folder / "schema.json").write_text(json.dumps(content))

    return tamper


def in_text(key: str, value: object) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        path = folder / "text" / "doc" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return tamper


def in_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = "tables.tables.doc_item_id.weight"
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return tamper


def in_item(key: str, value: object) -> Callable[[Path], None]:
    return in_schema(lambda content: content["doc"]["item_id"].update({key: value}))


def in_age(key: str, value: object) -> Callable[[Path], None]:
    return in_schema(lambda content: content["query"]["age"].update({key: value}))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (in_age("std", 0), r"age\.std: got 0, needs above 0"),
        (in_age("std", -1.0), r"age\.std: got -1\.0, needs above 0"),
        (in_age("mean", float("nan")), r"age\.mean: got nan, needs a finite number"),
        (in_age("mean", "0"), r"age\.mean is '0', needs"),
        (in_age("log", 1), r"age\.log is 1, needs"),
        (in_age("surprise", 1), "surprise"),
        (in_item("hash_buckets", -5), r"hash_buckets: got -5, needs at least 0"),
        (in_item("min_count", None), r"min_count: got None, needs"),
        (in_schema(lambda c: c["query"]["history"].update({"of": "nothing"})), "history.of: got nothing"),
        (in_schema(lambda c: c["query"]["history"].update({"max_items": 10**12})), "max_items: got"),
        (in_schema(lambda c: c["doc"].update({"item_id": []})), "schema.json is damaged"),
        (lambda folder: (folder / "schema.json").write_text(DEEP), "schema.json is damaged"),
        (in_text("num_attention_heads", 0), "does not load"),
        (in_text("num_attention_heads", None), "does not load"),
        (in_text("hidden_act", "nothing"), "does not load"),
        (in_text("vocab_size", 10**9), r"differ|model\.safetensors: .* needs"),
        (lambda folder: (folder / "text/doc/config.json").write_text(DEEP), "does not load"),
        (in_weights(lambda t: t.to(torch.int32)), r"is torch\.int32 .* needs torch\.float32"),
        (in_weights(lambda t: t * float("nan")), "holds NaN or inf"),
        (in_weights(lambda t: t / 0), "holds NaN or inf"),
        (in_weights(lambda t: t[:-1]), r"doc_item_id\.weight is torch\.float32 \[41, .* needs torch\.float32 \[42"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "does not load"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "does not load"),
    ],
)
def test_a_tampered_folder_gives_a_one_line_error(copied: Path, tamper: Callable[[Path], None], message: str) -> None:
    tamper(copied)
    refused(copied, message)


def test_a_changed_config_is_refused_before_a_model_is_built(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load((copied / "config.yaml").read_text())
    content["model"]["dim"] = 8192
    (copied / "config.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(model_folder, "DualEncoder", None)
    refused(copied, "the model section of config.yaml")


def test_a_model_larger_than_its_weights_takes_no_memory(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load((copied / "config.yaml").read_text())
    content["model"]["doc"]["mlp"] = [16384, 16384]
    (copied / "config.yaml").write_text(yaml.safe_dump(content))
    meta = json.loads((copied / "bigdssm.json").read_text())
    (copied / "bigdssm.json").write_text(json.dumps({**meta, "config_checksum": json_checksum([content["model"], ()])}))
    built = []
    real = model_folder.DualEncoder
    monkeypatch.setattr(
        model_folder, "DualEncoder",
        lambda *given, **named: built.append(torch.get_default_device().type) or real(*given, **named),
    )  # fmt: skip
    refused(copied, r"model\.safetensors")
    assert built == ["meta"]


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("bigdssm.json", load_model_folder),
        ("meta.json", read_meta),
        ("bigdssm_export.json", read_export),
        ("schema.json", Schema.load),
        ("dataset.json", lambda folder: read_json(folder / "dataset.json", "copy it")),
    ],
)
def test_json_that_is_too_deep_is_damage(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(BigDSSMError, match=name):
        read(tmp_path)


@pytest.mark.parametrize("files", [None, [], "vectors.npy"])
def test_a_meta_without_checksums_is_damage(index_dir: Path, tmp_path: Path, files: object) -> None:
    content = json.loads((index_dir / "meta.json").read_text())
    content.pop("checksum")
    content["files"] = files
    (tmp_path / "meta.json").write_text(json.dumps({**content, "checksum": json_checksum(content)}))
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged: TypeError"):
        read_meta(tmp_path)


@pytest.mark.parametrize(("name", "read"), [("bigdssm.json", load_model_folder), ("meta.json", read_meta)])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="it is no"):
        read(tmp_path)


def test_a_tokenizer_without_a_checksum_is_refused(copied: Path) -> None:
    meta = json.loads((copied / "bigdssm.json").read_text())
    del meta["checksums"]["tokenizer/tokenizer.json"]
    (copied / "bigdssm.json").write_text(json.dumps(meta))
    refused(copied, "does not list tokenizer/tokenizer.json")


def test_a_fitted_constant_is_within_its_own_bounds() -> None:
    fitter = Numeric().fitter()
    assert fitter.fitted(Numeric(), grow=False).std == 1.0
