"""Functions of installed packages: what is a pair, what is left out, and that nothing is run."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from bigdssm.errors import DataError
from bigdssm.ingest.public.docstrings import functions_of, write_functions

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


def test_what_a_function_becomes() -> None:
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
        "copy/__init__.py": MODULE,  # copy < shop: its functions come first, and shop's are the same
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
    with pytest.raises(DataError, match="holds no package 'stall'"):
        written(packages=["stall"])
    with pytest.raises(DataError, match="is no folder"):
        write_functions(site / "none", tmp_path / "f.jsonl.gz")
