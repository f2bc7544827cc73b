"""The docs match the source: their code is tested, and their links, files and options exist."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import bigdssm
from bigdssm.checkpoints import checkpoint, model_folder
from bigdssm.cli import PLUGINS
from bigdssm.commands import make_shards
from bigdssm.config.keys import SourceConfig, StageConfig
from bigdssm.config.removed import REMOVED_KEYS
from bigdssm.dataset import partition
from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval import vectors
from tests.unit.layers import LAYER_OF
from tools.checks.pages import code_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_code_of_extending_is_the_module_that_is_tried() -> None:
    entry, script, *blocks = code_of((ROOT / "docs/extending.md").read_text("utf-8"))
    assert f'entry-points."{PLUGINS}"' in entry and "bigdssm.commands.pretrain import main" in script
    tried = (ROOT / "tests/distributed/outside.py").read_text("utf-8")
    module = tried[tried.index("from __future__ import annotations\n") :]
    assert "".join("\n".join(blocks).split()) == "".join(module.split())


def test_the_tables_of_the_tutorial_become_its_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, config, make, *_ = code_of((ROOT / "docs/tutorials/tables.md").read_text("utf-8"))
    (tmp_path / "my.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    prepare, command = make.splitlines()
    assert prepare == "python make.py"
    assert make_shards.main(shlex.split(command.removeprefix("bigdssm make_shards "))) == 0
    opened = Dataset.open("datasets/shop")
    assert [opened.num_rows(split) for split in ("train", "validation", "test")] == [600, 600, 600]


def test_the_pairs_of_another_library_become_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, commands, *_ = code_of((ROOT / "docs/tutorials/coming_from.md").read_text("utf-8"))
    config, own = yaml.safe_load((ROOT / "configs/docstrings.yaml").read_text("utf-8")), yaml.safe_load(block)
    config["run"] |= own["run"]
    config["data"] |= {**own["data"], "tokenizer": {"vocab_size": 80}}  # in the place of MiniLM's
    for side in ("query", "doc"):
        config["model"][side]["text"] = {"layers": 1, "hidden": 8}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    pairs = [f'{{"anchor": "query {number}", "positive": "document {number}"}}\n' for number in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(pairs))
    monkeypatch.chdir(tmp_path)
    _, make, _ = commands.splitlines()
    assert make_shards.main(shlex.split(make.removeprefix("bigdssm make_shards "))) == 0
    dataset = Dataset.open("datasets/mine")
    assert dataset.catalogue.num_docs == 100 and dataset.catalogue.titles(np.array([0]))[0].startswith("document ")


def test_concepts_name_every_package() -> None:
    table = (ROOT / "docs/concepts.md").read_text("utf-8").split("## Packages")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)", row)}
    assert named == set(LAYER_OF) - {"__main__"}


DOCS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]


@pytest.mark.parametrize("doc", DOCS)
def test_code_is_in_blocks_of_a_language(doc: Path) -> None:
    """tools/checks/pages.py runs these blocks: bash, python and files with a title."""
    text = doc.read_text("utf-8")
    fences = re.findall(r"(?m)^ *```(.*)$", text)
    assert all(re.fullmatch(r'\w+( title="[^"]+")?', fence) for fence in fences[::2]), "a block without a language"
    assert not any(fences[1::2]), "a block that does not end"
    assert text.count("<!-- not run") == len(re.findall(r"(?m)^<!-- not run: .+ -->\n```", text))
    outside = re.sub(r"(?ms)^```.*?^```$", "", text)
    assert not re.findall(r"(?m)^\n {4,}.*$", outside), "an indented block"


@pytest.mark.parametrize("doc", DOCS)
def test_links_lead_somewhere(doc: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", doc.read_text("utf-8")):
        file, _, heading = target.partition("#")
        path = doc.parent / file if file else doc
        assert path.exists(), f"{doc.name} links to {target}"
        titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, f"{doc.name} links to {target}"


WRITTEN = [doc for doc in DOCS if doc.name not in ("config_keys.md", "evidence.md", "evidence_tables.md")]  # by hand
SECTIONS = "run|data|model|engine|pretrain|sft|STAGE|SIDE|loss|negatives|mining|distillation|sampling|optimizer"
SUFFIXES = ("py", "md", "sh", "json", "yaml")
NO_KEYS = {  # attributes in code, and keys that the changelog renames or removes
    "backward", "decode", "display", "encode_documents", "encode_queries", "model", "parameters", "repeats",
    "state_dict", "step", "train", "zero_grad",
}  # fmt: skip


@pytest.mark.parametrize("doc", WRITTEN)
def test_keys_files_tests_and_options_exist(doc: Path) -> None:
    text = re.sub(r"\\\n *", " ", doc.read_text("utf-8"))
    schema = (ROOT / "configs/config.schema.json").read_text("utf-8")
    removed = {key.rpartition(".")[2] for key in REMOVED_KEYS}
    keys = set(re.findall(r'"(\w+)": \{', schema)) | NO_KEYS | removed
    named = [key.split(".")[1:] for key in re.findall(rf"\b(?:{SECTIONS})(?:\.[a-z_]+)+", text)]
    assert not [key for key in named if not keys.issuperset(key) and key[-1] not in SUFFIXES]
    folders = "bigdssm|tools|launch|tests|losses|models|features|ingest|retrieval|training|evaluation"
    files = re.findall(rf"\b(?:{folders})/[\w/]+\.(?:py|yaml|sh|sbatch)\b", text)
    homes = (ROOT, ROOT / "bigdssm")
    assert not [file for file in files if "NAME" not in file and not any((home / file).exists() for home in homes)]
    tests = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert tests.issuperset(re.findall(r"`(test_\w+)`", text))
    shared = re.findall(r'"(--[\w-]+)"', (ROOT / "bigdssm/cli.py").read_text("utf-8"))
    for command, line in re.findall(r"\bbigdssm (\w+)((?: [^`|#\n]*)?)", text):
        source = ROOT / f"bigdssm/commands/{command}.py"
        if source.exists():
            parts = ["_stage"] if command in ("pretrain", "sft") else []
            if "bigdssm.commands._ranks import" in source.read_text("utf-8"):
                parts.append("_ranks")
            sources = [(ROOT / f"bigdssm/commands/{name}.py").read_text("utf-8") for name in (command, *parts)]
            options = {"--help", *shared, *re.findall(r'"(--[\w-]+)"', "".join(sources))}
            assert options.issuperset(re.findall(r"(?<!\S)(--[\w-]+)", line)), f"{doc.name}: bigdssm {command}{line}"


NESTED = (
    "loss",
    "negatives",
    "sampling",
    "distillation",
    "optimizer",
    "documents",
    "table_optimizer",
    "warm_start",
)  # sections of their own on the page


def test_the_page_of_keys_is_that_of_the_source() -> None:
    page = (ROOT / "docs/config_keys.md").read_text("utf-8")
    made = runpy.run_path(str(ROOT / "tools/site/config_keys.py"))["page"]()
    assert page == made, "run PYTHONPATH=. python tools/site/config_keys.py"
    tables = dict(re.findall(r"^### (.*)\n\n.*\n\n((?:\|.*\n)+)", page, re.MULTILINE))
    for title, cls in (("`pretrain`, `sft`", StageConfig), ("`data.mixture[]`", SourceConfig)):
        keys = re.findall(r"^\| `(\w+)`", tables[title], re.MULTILINE)
        assert keys == [name for name in cls.__dataclass_fields__ if name not in NESTED]
    assert (
        "| `patience` | `int` | `0` | at least 0 and at most 1,000,000,000 | stop after" in tables["`pretrain`, `sft`"]
    )
    assert "| `dim` | `int` | `0` | at least 0 and at most 16,384 | length of the vectors" in tables["`type: vector`"]


def test_the_menu_has_every_page_once() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))


def test_the_changelog_has_the_version_and_its_formats() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = re.findall(r"^## (\S+?),? ", changelog, re.MULTILINE)[0]
    assert newest == bigdssm.__version__
    formats = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|", changelog, re.MULTILINE))
    read = {"dataset": partition, "checkpoint": checkpoint, "model folder": model_folder, "vectors and index": vectors}
    assert formats == {name: str(module.FORMAT) for name, module in read.items()}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("zensical") is None, reason="the site needs pip install -e '.[docs]'")
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for folder in ("docs", "bigdssm"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    build = ["zensical", "build", "--strict"]
    subprocess.run(build, cwd=tmp_path, check=True)
    pages = {page.stem: page.read_text("utf-8") for page in (tmp_path / "build/site").rglob("*.html")}
    assert "Raises ConfigError" in pages["api"] and "rows_global" in pages["config_keys"]
    fetched = r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]*rel="?stylesheet[^>]*href="(?:https?:)?//'
    assert not [name for name, page in pages.items() if re.search(fetched, page)]
    with (tmp_path / "docs/gpu.md").open("a") as page:
        page.write("[planted](loss.md#nowhere)\n")
    assert subprocess.run(build, cwd=tmp_path, capture_output=True).returncode != 0


def test_the_pythons_of_the_package_are_those_that_were_tried() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    tried = re.findall(r"^\| (3\.\d+) \|", (ROOT / "docs/start.md").read_text("utf-8"), re.MULTILINE)
    assert declared == tried and len(declared) >= 4
    assert f'requires-python = ">={declared[0]}"' in project
