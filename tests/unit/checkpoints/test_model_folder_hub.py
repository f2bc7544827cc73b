"""Model folders to the Hub and back, with a fake of its API on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

import bigdssm
from bigdssm.errors import CheckpointError
from tests.conftest import QuietServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/films"


class HubAPI(BaseHTTPRequestHandler):
    """The Hub's API for one repository of small files."""

    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.made = True
            self.answer({"url": f"{self.server.endpoint}/{REPO}"})
        elif self.path == "/api/validate-yaml":  # the front matter of a model card
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.endpoint}/{REPO}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.answer({"error": f"the stand-in knows no {self.path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if not self.server.made or REPO not in path:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif name:
            content = self.server.files[name]
            self.answer(content, 200, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": COMMIT})
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            self.answer([{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                         for n, c in self.server.files.items()])  # fmt: skip
        else:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Hub(QuietServer):
    """A server with a repository that is created on first use."""

    made = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubAPI)
        self.files: dict[str, bytes] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name, value in {
        "ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_model_comes_back_from_the_hub(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").write_text("# A card")
    (folder / "notes.txt").write_text("mine")
    assert bigdssm.push_to_hub(folder, REPO).endswith(COMMIT)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(hub.files) == written - {"notes.txt"}
    model = bigdssm.from_pretrained(REPO)
    assert model.checksum == bigdssm.load_model(folder).checksum
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bigdssm.from_pretrained(REPO).checksum == model.checksum, "not read from the cache"


def test_only_whole_model_folders_are_pushed(folder: Path, hub: Hub) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    for bad, sentence in ((folder, "damaged"), (folder / "tokenizer", "is not a model folder")):
        with pytest.raises(CheckpointError, match=sentence):
            bigdssm.push_to_hub(bad, REPO)
    assert not hub.made


def test_a_damaged_download_is_refused(folder: Path, hub: Hub) -> None:
    bigdssm.push_to_hub(folder, REPO)
    hub.files["model.safetensors"] += b"\0"
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        bigdssm.from_pretrained(REPO)


def test_an_error_of_the_hub_gives_a_one_line_error(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for repo_id in ("someone/nothing", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"rejected the request for {repo_id}, or cannot be reached: .+"):
            bigdssm.from_pretrained(repo_id)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=f"rejected the request for {REPO}, or cannot be reached: .+"):
        bigdssm.push_to_hub(folder, REPO)
