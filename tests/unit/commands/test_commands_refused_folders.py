"""Commands on damaged, edited or mismatched folders: a one-sentence error, no scores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bigdssm.dataset.dataset import Dataset
from tests.command_line import Tools
from tests.conftest import NUM_ITEMS


@pytest.fixture
def copies(model_dir: Path, index_dir: Path, tmp_path: Path) -> Path:
    """A folder with copies of a model, its vectors and its index."""
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(index_dir, tmp_path / "index")
    shutil.copytree(index_dir.with_name("vectors"), tmp_path / "vectors")
    return tmp_path


def search(copies: Path, *options: object) -> list[object]:
    return ["search", "--model", copies / "model", "--index", copies / "index", *(options or ("--user", "u7"))]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a YAML or JSON file in place."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(score="cosine" if config["model"]["score"] == "dot" else "dot"),
        lambda config: config["model"].update(alpha_init=3.0),
        lambda config: config.pop("model"),
    ],
)
def test_a_config_that_changes_scores_is_refused(tools: Tools, copies: Path, change: Any) -> None:
    edit(copies / "model" / "config.yaml", change)
    message = tools.refused(4, *search(copies))
    assert "the model section of config.yaml differs from the model's training" in message


def test_edits_that_change_no_score_are_allowed(tools: Tools, copies: Path, dataset: Dataset) -> None:
    """A moved dataset, and reordered or commented YAML."""
    expected = tools.ran(*search(copies))
    shutil.copytree(dataset.dir, copies / "moved")
    edit(copies / "model" / "config.yaml", lambda config: config["data"].update(dir=str(copies / "moved")))
    path = copies / "model" / "config.yaml"
    path.write_text("# it moved\n" + path.read_text())
    assert tools.ran(*search(copies)) == expected


@pytest.mark.parametrize("file", ["schema.json", "tokenizer/tokenizer.json", "text/doc/config.json"])
def test_an_index_requires_the_same_schema_tokenizer_and_architecture(tools: Tools, copies: Path, file: str) -> None:
    """The same weights with another schema, tokenizer or architecture are another model."""
    from bigdssm.checkpoints.checkpoint import file_checksum

    model = copies / "model"
    text = (model / file).read_text()
    (model / file).write_text(text + "\n")
    edit(model / "bigdssm.json", lambda meta: meta["checksums"].update({file: file_checksum(model / file)}))
    assert "holds vectors of model" in tools.refused(4, *search(copies))


def test_a_model_folder_of_another_format_is_named(tools: Tools, copies: Path) -> None:
    edit(copies / "model" / "bigdssm.json", lambda meta: meta.update(format=2))
    message = tools.refused(4, *search(copies))
    assert "is a model folder of format 2, this version reads format 1" in message


def test_a_run_is_not_a_model_folder_but_holds_some(tools: Tools, copies: Path) -> None:
    run, index = copies / "run", ("--index", copies / "index", "--user", "u7")
    shutil.copytree(copies / "model", run / "pretrain" / "best")
    for given, meant in ((run, "pretrain/best"), (run / "pretrain", "best")):
        message = tools.refused(4, "search", "--model", given, *index)
        assert f"has no bigdssm.json; did you mean {given / meant}?" in message
    shutil.copytree(copies / "model", run / "sft" / "best")
    assert f"did you mean {run / 'sft' / 'best'}?" in tools.refused(4, "search", "--model", run, *index)
    assert tools.run("search", "--model", copies, *index)[0] == 0, "a folder of model folders"


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
@pytest.mark.parametrize("file", ["index.faiss", "documents.arrow", "meta.json"])
def test_a_damaged_index_is_named(tools: Tools, copies: Path, damage: Any, file: str) -> None:
    damage(copies / "index" / file)
    assert file in tools.refused(4, *search(copies))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
@pytest.mark.parametrize("file", ["vectors.npy", "documents.arrow", "contents.npy", "meta.json"])
def test_damaged_vectors_are_named(
    tools: Tools, copies: Path, dataset: Dataset, damage: Any, file: str
) -> None:  # fmt: skip
    damage(copies / "vectors" / file)
    if file == "contents.npy":  # used by --since only
        command: list[object] = ["embed", "--model", copies / "model", "--data", dataset.dir, "--out", copies / "out"]
        command += ["--since", copies / "vectors"]
    else:
        command = ["build_index", "--vectors", copies / "vectors", "--out", copies / "out"]
    assert file in tools.refused(4, *command)
    assert not (copies / "out").exists()


@pytest.mark.parametrize("key", ["kind", "model_checksum", "dataset_fingerprint", "num_docs", "width", "files"])
def test_an_edited_meta_is_refused(tools: Tools, copies: Path, key: str) -> None:
    """For example the index of another model."""
    edit(copies / "index" / "meta.json", lambda meta: meta.update({key: "other"}))
    assert "meta.json is damaged: its checksum" in tools.refused(4, *search(copies))


def test_top_is_cut_to_the_documents(tools: Tools, copies: Path) -> None:
    """Filling 10⁹ positions would take most of a minute."""
    everything = tools.ran(*search(copies, "--user", "u7", "--top", 40))
    assert tools.ran(*search(copies, "--user", "u7", "--top", 10**15)) == everything


@pytest.mark.parametrize(
    "query",
    [("--text", "age="), ("--text", "age= ", "occupation="), ("--history", ""), ("--history", " ; ;"), ("--user", "")],
)
def test_an_empty_query_is_refused(tools: Tools, copies: Path, query: tuple[str, ...]) -> None:
    assert "the query is empty" in tools.refused(2, *search(copies, *query))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (("--user", "\udcff"), "'\\udcff' is not valid UTF-8"),
        (("--history", "i2;\udcff"), "'\\udcff' is not valid UTF-8"),
        (("--text", "occupation=\udcff"), "'\\udcff' is not valid UTF-8"),
        (("--text", "age=1_0"), "age is '1_0', needs a number"),
        (("--text", "=3"), "--text '=3': needs feature=value"),
        (("--text", "age=3", "age=4"), "--text contains age twice"),
        (("--user", "u7", "--context", "kind=3"), "context: 'kind' is not a feature of requests; they are: none"),
        (("--user", "u7", "--context", "kind=3", "--context", "kind=4"), "--context contains kind twice"),
        (("--user", "u7", "--now", "nan"), "now is nan, needs a finite number"),
    ],
)
def test_queries_of_other_types_are_refused(
    tools: Tools, copies: Path, query: tuple[str, ...], sentence: str
) -> None:  # fmt: skip
    assert sentence in tools.refused(2, *search(copies, *query))


def test_vectors_and_indexes_do_not_replace_each_other(tools: Tools, copies: Path, dataset: Dataset) -> None:
    """Vectors may have taken days to encode."""
    vectors, index = copies / "vectors", copies / "index"
    embed = ("embed", "--model", copies / "model", "--data", dataset.dir, "--out")
    message = tools.refused(2, "build_index", "--vectors", vectors, "--out", vectors)
    assert "holds contents.npy, which this would replace; choose another one or --overwrite" in message
    assert "holds index.faiss, which this would replace" in tools.refused(2, *embed, index)
    tools.ran("build_index", "--vectors", vectors, "--out", index)  # each replaces its own kind
    tools.ran(*embed, vectors)
    tools.ran(*search(copies))


@pytest.mark.slow
def test_targets_of_links_are_written(tools: Tools, copies: Path, dataset: Dataset) -> None:
    """Twice, and the link is preserved."""
    for name in ("v", "i", "m"):
        (copies / f"disk-{name}").mkdir()
        (copies / name).symlink_to(copies / f"disk-{name}")
    for _ in range(2):
        tools.ran("embed", "--model", copies / "model", "--data", dataset.dir, "--out", copies / "v")
        tools.ran("build_index", "--vectors", copies / "v", "--out", copies / "i")
        tools.ran("convert_checkpoint", "--model", copies / "model", "--out", copies / "m")
    assert all((copies / name).is_symlink() for name in ("v", "i", "m"))
    assert (copies / "disk-v" / "vectors.npy").is_file() and (copies / "disk-m" / "model.safetensors").is_file()
    tools.ran("search", "--model", copies / "m", "--index", copies / "disk-i", "--user", "u7")


def test_files_that_were_not_written_with_a_model_are_not_read(tools: Tools, copies: Path) -> None:
    expected = tools.ran(*search(copies))
    shutil.copytree(copies / "model" / "text" / "doc", copies / "model" / "text" / "query")
    (copies / "model" / "text" / "junk").mkdir()
    assert tools.ran(*search(copies)) == expected


@pytest.mark.parametrize(
    ("ranks", "rows", "sentence"),
    [
        (("0", "1"), 0, "--rows-per-shard 0: needs at least 1"),
        (("0", "1"), -3, "--rows-per-shard -3: needs at least 1"),
        (("5", "2"), 9, "RANK=5 WORLD_SIZE=2: needs a rank from 0 to WORLD_SIZE - 1"),
        (("x", "2"), 9, "RANK=x WORLD_SIZE=2: needs a rank"),
    ],
)
def test_an_embedding_that_would_do_nothing_is_refused(
    tools: Tools, copies: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch,
    ranks: tuple[str, str], rows: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", ranks[0])
    monkeypatch.setenv("WORLD_SIZE", ranks[1])
    command = ("embed", "--model", copies / "model", "--data", dataset.dir, "--out", copies / "v")
    assert sentence in tools.refused(2, *command, "--rows-per-shard", rows)
    assert not (copies / "v").exists()


def test_an_unknown_split_is_refused(tools: Tools, model_dir: Path, dataset: Dataset) -> None:
    message = tools.refused(3, "evaluate", "--model", model_dir, "--data", dataset.dir, "--split", "nope")
    assert "has no rows in split 'nope'; its splits are ['test', 'train', 'validation']" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        (None, "is not an export of this version"),
        ("{", "is not an export of this version"),
        ("[]", "is not an export of this version"),
        ('{"model_checksum": "m"}', "is not an export of this version"),
        ('{"model_checksum": "m", "checksums": {"query.onnx": "0"}}', "query.onnx is damaged: its checksum"),
        ('{"model_checksum": "m", "checksums": {"doc.onnx": "0"}}', "doc.onnx is missing"),
        ('{"model_checksum": "m", "checksums": {}}', "is an export of another model"),
    ],
)
def test_a_damaged_export_is_named(
    tools: Tools, copies: Path, dataset: Dataset, marker: str | None, sentence: str
) -> None:  # fmt: skip
    export = copies / "export"
    export.mkdir()
    (export / "query.onnx").write_bytes(b"flipped")
    if marker is not None:
        (export / "bigdssm_export.json").write_text(marker)
    rest = ("--model", copies / "model", "--vectors", copies / "vectors", "--data", dataset.dir)
    assert sentence in tools.refused(4, "bench_onnx", "--onnx", export, *rest)


def test_mining_beyond_the_catalogue_uses_all_documents(tools: Tools, copies: Path, dataset: Dataset) -> None:
    out, rest = copies / "mined.npy", ("--model", copies / "model", "--data", dataset.dir)
    tools.ran("mine_negatives", "--out", out, *rest, "--first", 3, "--last", 10**8)
    assert np.load(out)["window"].shape == (dataset.num_rows("train"), NUM_ITEMS - 3)
    assert "--margin nan: needs a finite number" in tools.refused(
        2, "mine_negatives", "--out", out, *rest, "--margin", "nan"
    )
    assert "--exact-up-to -1: needs at least 0" in tools.refused(
        2, "mine_negatives", "--out", out, *rest, "--exact-up-to", -1
    )
    assert f"--out {copies} is a folder" in tools.refused(2, "mine_negatives", "--out", copies, *rest)
    np.save(out, np.array(["x"], object), allow_pickle=True)
    message = tools.refused(3, "sample_negatives", "--mined", out, "--data", dataset.dir)
    assert "is not a hard-negatives file; make it with" in message and "pickle" not in message


@pytest.mark.slow
def test_an_edited_comparison_is_not_compared_with(tools: Tools, copies: Path, dataset: Dataset) -> None:
    """Ranks below 1 would give metrics above 1; ranks of other shapes or rows do not pair."""
    command = ("evaluate", "--model", copies / "model", "--data", dataset.dir)
    tools.ran(*command, "--out", copies / "one.json")
    edit(copies / "one.json", lambda content: content["systems"][0].update(seconds="soon"))
    assert "is not a comparison written by" in tools.refused(3, *command, "--compare", copies / "one.json")
    tools.ran(*command, "--out", copies / "one.json", "--overwrite")
    ranks = np.load(copies / "one.ranks-0.npy")
    some = np.where(np.arange(len(ranks)) % 2, ranks, np.nan)
    for changed in (ranks * 0, -ranks, ranks.astype(str), np.array(3.0), ranks[:, None], ranks * np.inf, some):
        np.save(copies / "one.ranks-0.npy", changed)
        message = tools.refused(3, *command, "--compare", copies / "one.json")
        assert "one.ranks-0.npy does not match its checksum" in message
    (copies / "one.json").write_text("[" * 100_000)
    assert "is not a comparison written by" in tools.refused(3, *command, "--compare", copies / "one.json")


@pytest.mark.slow
def test_files_are_written_where_a_link_leads_and_over_no_device(
    tools: Tools, copies: Path, dataset: Dataset, run_dir: Path
) -> None:  # fmt: skip
    """For example /dev/null, which root could otherwise replace by a file."""
    data = ("--model", copies / "model", "--data", dataset.dir)
    commands: list[tuple[object, ...]] = [("evaluate", *data), ("mine_negatives", *data), ("report", run_dir)]
    os.mkfifo(copies / "pipe")
    for number, command in enumerate(commands):
        link = copies / f"link-{number}"
        link.symlink_to(copies / f"file-{number}")
        tools.ran(*command, "--out", link)
        assert link.is_symlink() and (copies / f"file-{number}").is_file()
        assert "is a folder; name a file" in tools.refused(2, *command, "--out", copies)
        assert "is a device or pipe; name a file" in tools.refused(2, *command, "--out", copies / "pipe")
    assert (copies / "pipe").is_fifo()


def test_numbers_and_names_that_mean_nothing_are_refused(tools: Tools, copies: Path, run_dir: Path) -> None:
    data = Dataset.open(yaml.safe_load((copies / "model" / "config.yaml").read_text())["data"]["dir"]).dir
    assert "--rows -1: needs at least 0" in tools.refused(2, "inspect_shards", data, "--rows", -1)
    sample = ("sample_negatives", "--mined", copies / "none.npy", "--data", data)
    assert "--count 0: needs at least 1" in tools.refused(2, *sample, "--count", 0)
    assert "needs a file name ending in .png" in tools.refused(2, "plot_run", run_dir, "--out", copies / "curves.txt")
    assert "is a folder; name a file" in tools.refused(2, "plot_run", run_dir, "--out", copies)
    message = tools.refused(2, "report", run_dir, run_dir, "--out", copies / "twice.json")
    assert f"{run_dir} has the same seed as {run_dir}" in message


def test_a_load_test_without_a_server_is_refused(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "queries").write_text("stone\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    command = ("bench_serve", "--url", "http://127.0.0.1:9", "--queries")
    assert "no server responds" in tools.refused(2, *command, tmp_path / "queries")
    assert "is no UTF-8 text file" in tools.refused(3, *command, tmp_path / "binary")
    assert "--clients needs at least 1" in tools.refused(2, *command, tmp_path / "queries", "--clients", 0)
