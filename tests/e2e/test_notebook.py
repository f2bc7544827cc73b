"""The unmodified notebook on MovieLens, without network access."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.distributed.real_data import ROOT, fetched_movielens

NOTEBOOK = "docs/notebooks/films.ipynb"


@pytest.mark.slow
@pytest.mark.e2e
def test_the_notebook_runs_and_its_model_beats_popularity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs pip install -e '.[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install -e '.[docs]'")
    source = fetched_movielens()
    if isinstance(source, str):
        pytest.skip(source)
    folder = (tmp_path / NOTEBOOK).parent
    folder.mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/movielens_100k.yaml", tmp_path / "configs")
    (folder / "films").mkdir()
    shutil.copytree(source, folder / "films/source", ignore=shutil.ignore_patterns("*.whl"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    systems = json.loads((folder / "films/evaluation.json").read_text())["systems"]
    hits = {system["name"]: system["hr_at_10"] for system in systems}
    assert hits["best"] > hits["popularity"] > 0
