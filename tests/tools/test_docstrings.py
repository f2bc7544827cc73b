"""Functions of installed packages: extracted pairs, skipped functions, and no execution of code."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.commands.make_shards import main as make_shards
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from tools.public_data.__main__ import main
from tools.public_data.docstrings import functions_of, write_functions

ROOT = Path(__file__).parents[2]
MODULE = '''
raise RuntimeError("this file was run")

class Basket:
    @property
    def weight(self):
        """Return the weight of all that
        the basket holds.

        A second paragraph.
        """
        total = 0

        for fruit in self.fruits:
            total += fruit.weight
        return total

    def short(self):
        """Too few words."""
        a = 1
        b = 2
        return a + b

def little(x): "One line that holds everything there is."; return x

async def fetch(url):
    """Fetch a page and return its text."""
    page = await get(url)
    return page
'''


def test_functions_become_pairs_of_docstring_and_source() -> None:
    found = list(functions_of(MODULE, "shop.basket"))
    assert [f.name for f in found] == ["shop.basket.Basket.weight", "shop.basket.fetch"]
    assert {f.package for f in found} == {"shop"}
    assert found[0].docstring == "Return the weight of all that the basket holds."
    assert found[0].source.splitlines() == [
        "def weight(self):", "    total = 0", "    for fruit in self.fruits:", "        total += fruit.weight",
        "    return total",
    ]  # fmt: skip
    assert list(functions_of("def broken(:", "x")) == []


@pytest.mark.parametrize("deep", ["x = " + " + ".join("a" * 1500), "if a:\n    b\n" + "elif a:\n    b\n" * 1000])
def test_code_as_deep_as_python_parses_is_gone_through(deep: str) -> None:
    assert [f.name for f in functions_of(f"{MODULE}\n{deep}\n", "m")] == ["m.Basket.weight", "m.fetch"]


def test_packages_of_a_folder(tmp_path: Path) -> None:
    site = tmp_path / "site"
    one = 'def double(x):\n    """Return the double of a number {}."""\n    y = 2 * x\n    return y{}\n'
    files = {
        "shop/__init__.py": one.format("in a shop", " # a"),
        "shop/basket.py": MODULE,
        "shop/_vendor/other/__init__.py": one.format("vendored", " # b"),
        "copy/__init__.py": MODULE,  # copy < shop: read first, so that the equal functions of shop are skipped
        "single.py": one.format("in a module", " # c"),
        "shop-1.0.dist-info/hidden.py": one.format("of metadata", " # d"),
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)

    def written(**options: object) -> list[dict[str, str]]:
        count = write_functions(site, tmp_path / "f.jsonl.gz", **options)  # type: ignore[arg-type]
        with gzip.open(tmp_path / "f.jsonl.gz", "rt") as file:
            records = [json.loads(line) for line in file]
        assert len(records) == count
        return records

    names = [record["name"] for record in written()]
    assert names == ["copy.Basket.weight", "copy.fetch", "shop.double", "single.double"]
    first = (tmp_path / "f.jsonl.gz").read_bytes()
    assert [record["name"] for record in written(packages=["shop"])] == [
        "shop.double", "shop.basket.Basket.weight", "shop.basket.fetch",
    ]  # fmt: skip
    assert [record["package"] for record in written(max_per_package=1)] == ["copy", "shop", "single"]
    written()
    assert (tmp_path / "f.jsonl.gz").read_bytes() == first
    assert not {"shop", "single"} & set(sys.modules)
    with pytest.raises(DataError, match="contains no package 'stall'"):
        written(packages=["stall"])
    with pytest.raises(DataError, match="is no folder"):
        write_functions(site / "none", tmp_path / "f.jsonl.gz")


FUNCTION = '''
def {0}_{1}(basket):
    """Return what the {0} holds of {1} things.{2}"""
    held = basket["{0}"]
    return [thing for thing in held if thing == "{1}"]
'''


def test_docstrings_of_packages_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    site, names = tmp_path / "site", [f"package{n:02d}" for n in range(24)]
    for name in names:
        (site / name).mkdir(parents=True)
        functions = "".join(FUNCTION.format(name, kind, "") for kind in ("small", "large", "round"))
        (site / name / "__init__.py").write_text(f'raise RuntimeError("{name} was run")\n{functions}')
    (site / names[0] / "strange.py").write_text(FUNCTION.format("strange", "half", " \\ud800"))  # an unpaired surrogate
    (site / names[1] / "broken.py").write_text("def broken(:\n")
    (site / names[2] / "latin.py").write_bytes(b'"""\xe4"""\n' + FUNCTION.format("latin", "old", "").encode())
    (site / names[3] / "again.py").write_text(FUNCTION.format(names[0], "small", ""))  # a function of another package
    table, out = tmp_path / "functions.jsonl.gz", tmp_path / "out"
    command = ["docstrings", "--out", str(table), "--site-packages", str(site)]
    make = [
        "pairs", "--config", str(ROOT / "configs/docstrings.yaml"), "model.query.text.init=null", "--overwrite",
        "data.tokenizer.vocab_size=200", f"data.dir={out}", "--pairs", str(table), "--doc-id-column", "name",
        "--group-column", "package", "--test-fraction", "0.2", "--validation-fraction", "0.2",
        "--beir", str(tmp_path / "beir"),
    ]  # fmt: skip
    assert main(command) == make_shards(make) == 0
    said = capsys.readouterr().out
    assert f"{table}: 73 functions" in said and "73 documents" in said and "bad rows" not in said
    dataset = Dataset.open(out)
    packages = {}
    for split in ("train", "validation", "test"):
        docs = np.concatenate([rows.doc_rows for rows in dataset.iterate(split, 100)])
        packages[split] = {name.split(".")[0] for name in dataset.catalogue.titles(docs)}
    assert all(packages.values()) and sum(map(len, packages.values())) == len(names), "a package is in one split"
    assert set.union(*packages.values()) == set(names)
    assert len((tmp_path / "beir/corpus.jsonl").read_text().splitlines()) == 73
    assert main([*command, "--max-per-package", "1", "--packages", *names[:12]]) == make_shards(make) == 0
    assert sum(Dataset.open(out).num_rows(split) for split in packages) == 12
    assert main([*command, "--packages", "package77"]) == 3
    assert "contains no package 'package77'" in capsys.readouterr().err
