"""What the docs say of the source is so: code in them stands in a module that is tried, paths and rooms are there."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from bigdssm.cli import PLUGINS

from .test_layers import LAYERS

ROOT = Path(__file__).resolve().parents[2]


def code_of(path: Path) -> list[str]:
    """Return the indented blocks of a Markdown file, paragraphs of one block together."""
    blocks = re.findall(r"(?:^    .*\n(?:\n+(?=    ))?)+", path.read_text("utf-8"), re.MULTILINE)
    return [dedent(block).strip() for block in blocks]


def test_the_code_of_extending_is_the_module_that_is_tried() -> None:
    entry, script, *blocks = code_of(ROOT / "docs/extending.md")
    assert f'entry-points."{PLUGINS}"' in entry and "bigdssm.commands.pretrain import main" in script
    tried = (ROOT / "tests/distributed/outside.py").read_text("utf-8")
    _, _, module = tried.partition("from __future__ import annotations\n")
    assert "".join("\n".join(blocks).split()) == "".join(module.split())


def test_concepts_name_every_room() -> None:
    table = (ROOT / "docs/concepts.md").read_text("utf-8").split("## The rooms")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)", row)}
    small = {"__main__", "bounds", "cli", "loss_options", "source"}
    assert named == set(LAYERS) - small


@pytest.mark.parametrize("doc", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
def test_links_lead_somewhere(doc: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", doc.read_text("utf-8")):
        file, _, heading = target.partition("#")
        path = doc.parent / file if file else doc
        assert path.exists(), f"{doc.name} links to {target}"
        titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, f"{doc.name} links to {target}"
