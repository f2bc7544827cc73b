"""`--device` and `--ranks`: commands compute on the device that is named, and several ranks write the files of one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import csv

import bigdssm
from bigdssm.commands import mine_negatives
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.retrieval.exact_search import approximate_search
from bigdssm.retrieval.teacher_vectors import TeacherVectors
from bigdssm.utils import device as devices
from tests import simgpu

COMMANDS = {
    "embed": "--model {model} --data {data} --out {out}",
    "evaluate": "--model {model} --data {data} --out {out}.json",
    "mine_negatives": "--model {model} --data {data} --out {out}.npy --first 1 --last 9",
    "recommend": "--model {model} --index {index} --data {data} --users --top 3 --out {out}.csv",
    "embed_teacher": "--model {model} --data {data} --out {out}",
    "search": "--model {model} --index {index} --data {data} --user u7 --out {out}.csv",
}
FILES = {"embed": "/vectors.npy", "evaluate": ".ranks-0.npy", "mine_negatives": ".npy", "recommend": ".csv"}


@pytest.fixture
def gpu() -> Iterator[simgpu.Device]:
    with simgpu.Device() as device:
        yield device


def numbers(name: str, out: Path) -> np.ndarray:
    """Return the numbers that a command has written: vectors, metrics, negatives, or scores of documents."""
    if name == "embed":
        return np.load(out / "vectors.npy")
    if name == "embed_teacher":
        return np.asarray(TeacherVectors(out).documents, np.float32)
    if name == "evaluate":
        return np.load(f"{out}.ranks-0.npy")
    if name == "mine_negatives":
        return np.load(f"{out}.npy")["window"]
    table = csv.read_csv(f"{out}.csv")
    scores = np.asarray(table["score"])
    documents = table["document" if "document" in table.column_names else "key"]
    return np.stack([scores, np.array([int(key.as_py()[1:]) for key in documents])])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_encodes_on_the_device(
    name: str, model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path, gpu: simgpu.Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = importlib.import_module(f"bigdssm.commands.{name}")
    opener = importlib.import_module("bigdssm.serving.searcher") if name == "search" else command
    for device in (torch.device("cpu"), simgpu.PLACE):
        monkeypatch.setattr(opener, "find_device", lambda name, device=device: device)
        out = tmp_path / device.type
        gpu.reset()
        line = COMMANDS[name].format(model=model_dir, data=dataset.dir, index=index_dir, out=out)
        assert command.main(line.split()) == 0
        assert bool(gpu.launches) == (device == simgpu.PLACE)
        assert not gpu.mixed
    np.testing.assert_allclose(
        numbers(name, tmp_path / "simgpu"), numbers(name, tmp_path / "cpu"), rtol=1e-4, atol=1e-6
    )


def test_mining_on_a_device_is_exact(
    model_dir: Path, dataset: Dataset, tmp_path: Path, gpu: simgpu.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[torch.device] = []

    def approximate(documents: DocumentVectors, *arguments: object) -> object:
        searched.append(documents.vectors.device)
        return approximate_search(documents, *arguments)

    monkeypatch.setattr("bigdssm.retrieval.mining.approximate_search", approximate)
    for device in (torch.device("cpu"), simgpu.PLACE):
        monkeypatch.setattr(mine_negatives, "find_device", lambda name, device=device: device)
        line = COMMANDS["mine_negatives"].format(model=model_dir, data=dataset.dir, out=tmp_path / device.type)
        assert mine_negatives.main([*line.split(), "--exact-up-to", "5"]) == 0
    assert searched == [torch.device("cpu")]


def test_the_python_interface_encodes_on_the_device(
    model_dir: Path, gpu: simgpu.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, documents = [{"age": 30, "history": ["i3"]}], [{"title": "a"}]
    on_host = bigdssm.load_model(model_dir, "cpu")
    expected = on_host.encode_queries(queries), on_host.encode_documents(documents)
    for module in ("bigdssm.retrieval.model", "bigdssm.serving.searcher"):
        monkeypatch.setattr(f"{module}.find_device", lambda name: simgpu.PLACE)
    on_device = bigdssm.load_model(model_dir)
    gpu.reset()
    np.testing.assert_allclose(on_device.encode_queries(queries), expected[0], rtol=1e-5)
    np.testing.assert_allclose(on_device.encode_documents(documents), expected[1], rtol=1e-5)
    assert gpu.launches and not gpu.mixed


@pytest.mark.parametrize(
    ("name", "gpus", "environment", "expected"),
    [
        ("auto", 0, {}, "cpu"),
        ("auto", 4, {}, "cuda:0"),
        ("auto", 4, {"LOCAL_RANK": "3"}, "cuda:3"),
        ("auto", 1, {"LOCAL_RANK": "3"}, "cuda:0"),
        ("auto", 4, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        ("cpu", 4, {}, "cpu"),
        ("cuda", 4, {"LOCAL_RANK": "2"}, "cuda:2"),
        ("cuda:1", 4, {"LOCAL_RANK": "2"}, "cuda:1"),
        ("cuda", 0, {}, "--device cuda: this process needs GPU 0, and sees 0"),
        ("cuda:4", 4, {}, "--device cuda:4: this process needs GPU 4, and sees 4"),
        ("auto", 2, {"LOCAL_RANK": "3"}, "this process needs GPU 3, and sees 2"),
        ("gpu", 4, {}, "--device gpu: needs auto, cpu, cuda or cuda:INDEX"),
        ("cuda:x", 4, {}, "--device cuda:x: needs auto"),
        ("cuda:", 4, {}, "--device cuda:: needs auto"),
    ],
)
def test_the_device_of_a_name(
    name: str, gpus: int, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "num_gpus", lambda: gpus)
    for variable in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if expected.startswith(("cpu", "cuda")):
        assert str(devices.find_device(name)) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        devices.find_device(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ranks 2 --device cuda:0", "--ranks 2 --device cuda:0: needs a GPU for each rank, this machine has 4"),
        ("--ranks 5", "--ranks 5 --device auto: needs a GPU for each rank, this machine has 4"),
    ],
)
def test_ranks_without_a_gpu_each_are_refused(
    options: str, words: str, model_dir: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from bigdssm.commands.embed import main

    monkeypatch.setattr("bigdssm.commands._ranks.num_gpus", lambda: 4)
    monkeypatch.setattr(devices, "num_gpus", lambda: 4)
    line = f"--model {model_dir} --data {dataset.dir} --out {tmp_path / 'out'} {options}"
    assert main(line.split()) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["embed", *(pytest.param(name, marks=pytest.mark.slow) for name in FILES if name != "embed")]
)
def test_two_ranks_write_the_files_of_one(
    name: str, model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = importlib.import_module(f"bigdssm.commands.{name}")
    shards = ["--rows-per-shard", "7"] if name in ("embed", "recommend") else []
    for ranks in ("1", "2"):
        line = COMMANDS[name].format(model=model_dir, data=dataset.dir, index=index_dir, out=tmp_path / ranks)
        assert command.main([*line.split(), *shards, "--ranks", ranks]) == 0
        printed = capfd.readouterr().out
        assert printed.count(f" of {ranks}: ") == (int(ranks) if shards else 0), printed
    one, two = (Path(f"{tmp_path / ranks}{FILES[name]}").read_bytes() for ranks in ("1", "2"))
    assert one == two
