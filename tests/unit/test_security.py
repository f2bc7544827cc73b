"""Nothing that a folder or a shard brings along is ever run: no pickle is opened, no remote code trusted."""

from __future__ import annotations

import ast
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from bigdssm.checkpoints import checkpoint
from bigdssm.checkpoints.checkpoint import whole_tensor
from bigdssm.checkpoints.model_folder import META_FILE, WEIGHTS_FILE, load_model_folder, save_model_folder
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.config import load_config
from bigdssm.errors import BigDSSMError, CheckpointError, ConfigError
from bigdssm.models import new_model
from bigdssm.models.encoders.pretrained import pretrained_encoder
from tests.conftest import TinyDataset

ROOT = Path(__file__).resolve().parents[2]

# Calls that run what a file brings along, unless they say otherwise: name → (argument, value that makes it safe).
DANGEROUS = {
    "torch.load": None, "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "joblib.load": None,
    "yaml.load": None, "yaml.unsafe_load": None, "yaml.full_load": None, "torch.hub.load": None, "marshal.loads": None,
    "eval": None, "exec": None,
}  # fmt: skip
OWN_PROCESSES = "bigdssm/loader/messages.py"  # unpickles what the loader processes of a run send over its own sockets


class Bomb:
    """Makes the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self._mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that a bomb makes; the test fails where one went off."""
    path = tmp_path / "went off"
    yield path
    assert not path.exists(), "a pickle was opened"


def test_the_test_pickle_executes_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()
    torch.save({"x": Bomb(tmp_path / "second")}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "second").exists()


def plant(folder: Path, mark: Path, *names: str) -> None:
    """Put a bomb, as torch and as plain pickle write it, into files that some loader might look for."""
    for name in names:
        torch.save({"module": Bomb(mark)}, folder / name)
    (folder / "state.pkl").write_bytes(pickle.dumps(Bomb(mark)))


def test_a_pickle_in_a_checkpoint_is_not_opened(tmp_path: Path, mark: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(4, {"stream": {}}, {}, {"cpu": torch.zeros(3)}, [whole_tensor("weight", torch.ones(2))])
    path = tmp_path / "checkpoints" / "step-00000004"
    plant(path, mark, "rank-00000.pt", "mp_rank_00_model_states.pt", "tensors-00001.pt", "pytorch_model.bin")
    found = store.newest_valid()
    assert found is not None and found.rank_state is not None
    assert torch.equal(found.reader()("weight"), torch.ones(2))
    assert torch.equal(found.rank_state["cpu"], torch.zeros(3))


def forge(path: Path, name: str) -> None:
    """Make the manifest of a checkpoint fit the file `name` as it now is."""
    manifest = json.loads((path / "manifest.json").read_text())
    (share,) = [share for share in manifest["shares"] if share["file"] == name]
    share |= {"range": [0, (path / name).stat().st_size], "xxh3_128": [checkpoint.file_checksum(path / name)]}
    del manifest["checksum"]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({"checksum": checksum, **manifest}))


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "rank-00000.safetensors"])
def test_a_pickle_disguised_as_tensors_is_not_opened(
    tmp_path: Path, mark: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the manifest matches: the bytes are read as numbers at the offsets of the manifest."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(4, {"stream": {}}, {}, {"cpu": torch.zeros(3)}, [whole_tensor("weight", torch.ones(2))])
    path = tmp_path / "checkpoints" / "step-00000004"
    torch.save({"weight": Bomb(mark)}, path / name)
    assert store.newest_valid() is None
    path.with_name(f"damaged-{path.name}").rename(path)
    forge(path, name)
    logging.getLogger("bigdssm").propagate = True
    found = store.newest_valid()
    if name.startswith("rank"):
        assert found is None and "rank-00000.safetensors is damaged: Error while deserializing" in caplog.text
    else:
        assert found is not None and found.reader()("weight").dtype == torch.float32


@pytest.fixture
def model_folder(tmp_path: Path, tiny_pairs: TinyDataset) -> Path:
    from bigdssm.dataset.dataset import Dataset

    config, dataset = load_config(tiny_pairs.config), Dataset.open(tiny_pairs.dir)
    model = new_model(config.model, dataset.schema, dataset.vocab_size)
    save_model_folder(tmp_path / "model", model, config, dataset.schema, dataset.tokenizer_dir, {})
    return tmp_path / "model"


def test_a_pickle_in_a_model_folder_is_not_opened(model_folder: Path, mark: Path) -> None:
    plant(model_folder, mark, "pytorch_model.bin", "model.pt", "training_args.bin")
    load_model_folder(model_folder)
    torch.save({"x": Bomb(mark)}, model_folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="checksum"):
        load_model_folder(model_folder)
    meta = json.loads((model_folder / META_FILE).read_text())
    meta["checksums"][WEIGHTS_FILE] = checkpoint.file_checksum(model_folder / WEIGHTS_FILE)
    (model_folder / META_FILE).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="does not load"):
        load_model_folder(model_folder)


def test_a_pretrained_encoder_is_read_from_safetensors_only(tmp_path: Path, mark: Path) -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    bert.save_pretrained(tmp_path / "bert")
    folder = str(tmp_path / "bert")
    pretrained_encoder(folder)
    plant(tmp_path / "bert", mark, "pytorch_model.bin")
    pretrained_encoder(folder)
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="does not load"):
        pretrained_encoder(folder)


def test_code_in_a_pretrained_folder_is_not_run(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prompt either: an answer on the terminal would be enough."""
    folder = tmp_path / "bert"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom transformers import BertConfig, BertModel\n"
    code += "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
    code += "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map, "vocab_size": 30}))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match="does not load"):
        pretrained_encoder(str(folder))


def test_code_in_a_model_folder_is_not_run(model_folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = next(path for path in (model_folder / "text").iterdir() if path.is_dir())
    (text / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    content = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (text / "config.json").write_text(json.dumps(content))
    meta = json.loads((model_folder / META_FILE).read_text())
    for name in list(meta["checksums"]):
        meta["checksums"][name] = checkpoint.file_checksum(model_folder / name)
    (model_folder / META_FILE).write_text(json.dumps(meta))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises((BigDSSMError, ValueError), match=r"does not load|trust_remote_code"):
        load_model_folder(model_folder)


def test_no_source_file_opens_pickles_or_trusts_code() -> None:
    files = [file for folder in ("bigdssm", "launch", "tools") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    files.remove(ROOT / OWN_PROCESSES)
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in unsafe_lines(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import torch\nx = torch.load('a')", [2]),
        ("import pickle\npickle.loads(b'')", [2]),
        ("import numpy as np\nnp.load('a', allow_pickle=True)\nnp.load('a')", [2]),
        ("AutoModel.from_pretrained('a')\nAutoModel.from_pretrained('a', trust_remote_code=False)", [1]),
        ("AutoModel.from_config(c)\nAutoConfig.from_pretrained(p, trust_remote_code=True)", [1, 2]),
        ("model.eval()\nrandom.load()\nsave_file(t, p)", []),
    ],
)
def test_unsafe_lines_are_detected(source: str, lines: list[int]) -> None:
    assert list(unsafe_lines(source)) == lines


def unsafe_lines(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_auto = name.startswith("Auto") and name.rpartition(".")[2] in ("from_pretrained", "from_config")
        splatted = None in arguments  # **arguments: what they hold cannot be read here
        if (
            name in DANGEROUS
            or arguments.get("allow_pickle", "False") != "False"
            or (is_auto and arguments.get("trust_remote_code") != "False" and not splatted)
        ):
            yield node.lineno
