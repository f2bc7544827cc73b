"""The bench that chooses a recipe for small sets of text pairs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.bench_text_recipe import HELD_OUT, HELD_OUT_PAIRS, Recipe, Row, Subsample, TextSet, sampled, search


def rows(_: Path) -> Iterator[Row]:
    """Yield groups of two rows; every twentieth row has the document of another group."""
    for number in range(20_000):
        document = number - 2 if number % 20 == 3 else number
        yield {"group": f"group {number // 2}", "doc": f"document {document}", "query": f"query {number}"}


def subsample(pairs: int, documents: int = 3000) -> list[Row]:
    args = argparse.Namespace(seed=0, documents=documents, tokens=32, source=Path(), folder="")
    return list(sampled(TextSet(rows, "group", "doc", "query", "text"), Subsample("any", pairs, args)))


def test_train_has_no_group_and_no_document_of_the_other_splits() -> None:
    found = subsample(500)
    assert found == subsample(500)
    by_split = {split: [row for row in found if row["split"] == split] for split in ("train", "none", *HELD_OUT_PAIRS)}
    assert {split: len(by_split[split]) for split in ("train", *HELD_OUT_PAIRS)} == {"train": 500, **HELD_OUT_PAIRS}
    for column in ("group", "doc"):
        held_out = {row[column] for split in HELD_OUT_PAIRS for row in by_split[split]}
        assert held_out.isdisjoint(row[column] for row in by_split["train"])
    assert len({row["doc"] for row in found}) == 3000 and by_split["none"]
    assert not any(row["split"] == "none" for row in subsample(500, documents=10))


def test_train_has_most_groups() -> None:
    found = subsample(20_000, documents=20_000)
    train = {row["group"] for row in found if row["split"] in ("train", "none")}
    assert len(train) / 10_000 == pytest.approx(1 - 2 * HELD_OUT, abs=0.02)


def test_smaller_subsamples_are_part_of_larger_ones() -> None:
    small, large = ([(row["split"], row["query"]) for row in subsample(pairs)] for pairs in (100, 400))
    small_train, large_train = ({row for row in part if row[0] == "train"} for part in (small, large))
    assert small_train < large_train
    small_rest, large_rest = ({row for row in part if row[0] in HELD_OUT_PAIRS} for part in (small, large))
    assert small_rest == large_rest


@pytest.mark.parametrize(("pairs", "expected"), [(500, (128, 16)), (5000, (128, 157)), (100, (96, 5))])
def test_steps_follow_from_the_number_of_pairs(pairs: int, expected: tuple[int, int]) -> None:
    overrides = dict(line.split("=", 1) for line in Recipe(epochs=4.0).overrides(pairs))
    assert (int(overrides["pretrain.rows_global"]), int(overrides["pretrain.steps"])) == expected


def test_the_choice_for_a_set_ignores_its_own_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"lr-5e-5": {"tldr": 1.0, "medquad": 0.0}, "lr-1e-4": {"tldr": 0.0, "medquad": 0.5}}
    monkeypatch.setattr(Subsample, "train", lambda self, recipe: {"validation": values[recipe][self.set]})
    args = argparse.Namespace(
        recipes=list(values), sets=["tldr", "medquad"], out=tmp_path / "search.json", tokens=32, seed=0, documents=3000
    )
    search([Subsample(name, 500, args) for name in args.sets], args)
    choices = json.loads(args.out.read_text())["choices"]
    assert choices == {"tldr": "lr-1e-4", "medquad": "lr-5e-5", "all": "lr-5e-5"}
