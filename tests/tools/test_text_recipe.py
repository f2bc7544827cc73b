"""The bench that chooses a recipe for small sets of text pairs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.bench_text_recipe import ROWS, Recipe, Row, Subsample, TextSet, sampled


def rows(_: Path) -> Iterator[Row]:
    """Groups of two rows; every tenth document is in two groups."""
    for number in range(20_000):
        document = number - 2 if number % 20 == 3 else number
        yield {"group": f"group {number // 2}", "doc": f"document {document}", "query": f"query {number}"}


def subsample(pairs: int, documents: int = 3000) -> list[Row]:
    args = argparse.Namespace(seed=0, documents=documents, tokens=32, source=Path(), folder="")
    return list(sampled(TextSet(rows, "group", "doc", "query", "text"), Subsample("any", pairs, args)))


def test_train_has_no_group_and_no_document_of_the_other_splits() -> None:
    found = subsample(500)
    assert found == subsample(500)
    by_split = {split: [row for row in found if row["split"] == split] for split in ("train", "none", *ROWS)}
    assert {split: len(by_split[split]) for split in ("train", *ROWS)} == {"train": 500, **ROWS}
    for column in ("group", "doc"):
        train, held_out = ({row[column] for split in of for row in by_split[split]} for of in (("train",), ROWS))
        assert not train & held_out
    assert len({row["doc"] for row in found}) == 3000 and by_split["none"]
    assert not any(row["split"] == "none" for row in subsample(500, documents=10))


def test_smaller_subsamples_are_part_of_larger_ones() -> None:
    small, large = ({row["query"]: row["split"] for row in subsample(pairs)} for pairs in (100, 400))
    assert {query for query, split in small.items() if split == "train"} < large.keys()
    assert {q for q, split in small.items() if split in ROWS} == {q for q, split in large.items() if split in ROWS}


@pytest.mark.parametrize(("pairs", "expected"), [(500, (128, 16)), (5000, (128, 157)), (100, (96, 5))])
def test_steps_follow_from_the_number_of_pairs(pairs: int, expected: tuple[int, int]) -> None:
    overrides = dict(line.split("=", 1) for line in Recipe(epochs=4.0, rows=128).overrides(pairs))
    assert (int(overrides["pretrain.rows_global"]), int(overrides["pretrain.steps"])) == expected
