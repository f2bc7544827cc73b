"""Vocabularies, normalization and the tokenizer are a function of the data; vocabularies are append-only."""

import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bigdssm.config import TokenizerConfig
from bigdssm.errors import ConfigError
from bigdssm.features import Categorical, Feature, Numeric, TextTokenizer, Vocabulary, encode_columns
from bigdssm.ingest.documents import spool_columns
from bigdssm.ingest.engines import LocalEngine, RowFile
from bigdssm.ingest.fitting import FittedSide, fit_side, make_tokenizer, train_wordpiece

CONFIGS = {
    "kind": Categorical(min_count=2),
    "tags": Categorical(multi=True),
    "size": Numeric(log=True),
    "hashed": Categorical(hash_buckets=8),
}
TEXTS = [["The quick brown fox, jumping over lazy dogs!", "Zebras & quick ünïcode 漢字"] * 20, ["foxes jump"] * 10]


def canonical(kinds: list[str], tags: list[list[str]], sizes: list[float]) -> pa.Table:
    text = pa.array(kinds, pa.large_string())
    return pa.table(
        {"kind": text, "tags": pa.array(tags, pa.list_(pa.large_string())), "size": pa.array(sizes), "hashed": text}
    )


def fitted_to(
    folder: Path, features: dict[str, Feature], tables: list[pa.Table], *, grow: bool = False
) -> dict[str, Feature]:
    folder.mkdir()
    columns = [("place", pa.int64()), *spool_columns("f", features)]
    with RowFile(folder / "rows.parquet", pa.schema(columns)) as file:
        for place, table in enumerate(tables):
            values = [pa.array([10 * place + row for row in range(table.num_rows)]), *table.columns]
            file.add(pa.Table.from_arrays(values, names=[name for name, _ in columns]))
    engine = LocalEngine(folder / "spool")
    side = FittedSide("doc", engine.table("rows", [folder / "rows.parquet"]), "f", features)
    return fit_side(engine, side, grow=grow)


@pytest.mark.parametrize("rows_per_fit", [1, 2, 100])
def test_fit_leaves_out_rare_and_missing_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_fit: int
) -> None:
    monkeypatch.setattr("bigdssm.ingest.fitting.ROWS_PER_FIT", rows_per_fit)
    features = {name: config.with_name(name) for name, config in CONFIGS.items()}
    sizes = [0.0, 3.0, float("nan"), 8.0, 100.0]
    tables = [
        canonical(["b", "a", ""], [["y", "x"], [], ["x"]], sizes[:3]),
        canonical(["b", "c"], [["a"], []], sizes[3:]),
    ]
    fitted: Any = fitted_to(tmp_path / "first", features, tables)
    assert tuple(fitted["kind"].vocabulary) == ("b",), "the others are rare"
    assert tuple(fitted["tags"].vocabulary) == ("x", "y", "a"), "by their first row, then by the alphabet"
    assert tuple(fitted["hashed"].vocabulary) == ()
    logs = np.log1p([0.0, 3.0, 8.0, 100.0])
    assert fitted["size"].mean == pytest.approx(logs.mean()) and fitted["size"].std == pytest.approx(logs.std())

    more = canonical(["d", "b", "d"], [["x", "w"], [], []], [1e6, 1e6, 1e6])
    later: Any = fitted_to(tmp_path / "later", fitted, [more], grow=True)
    assert tuple(later["kind"].vocabulary) == ("b", "d") and tuple(later["tags"].vocabulary) == ("x", "y", "a", "w")
    assert later["size"] == fitted["size"], "a model's inputs keep their normalization"


def test_encoded_columns_hold_codes_in_the_schema_s_sense() -> None:
    features = {name: config.with_name(name) for name, config in CONFIGS.items()}
    features["kind"] = replace(features["kind"], vocabulary=Vocabulary.of(("b", "a")))
    features["tags"] = replace(features["tags"], vocabulary=Vocabulary.of(("x", "y")))
    table = canonical(["a", "?", "", "b"], [["y", "?"], [], ["x"], ["x", "y"]], [1.0, float("nan"), 3.0, 4.0])
    columns = encode_columns(table.slice(1), features, None, large=True)
    assert columns["kind"].to_pylist() == [1, 0, 2]
    assert columns["tags"].to_pylist() == [[], [2], [2, 3]] and columns["tags"].type == pa.list_(pa.int32())
    assert columns["size"].type == pa.float32() and np.isnan(columns["size"][0].as_py())
    assert columns["hashed"][1].as_py() == 0 and 2 <= columns["hashed"][2].as_py() < 10


def test_the_trained_tokenizer_is_bert_like_and_loads_through_auto_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(TokenizerConfig(vocab_size=150), lambda: TEXTS, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.pad_token_id == 0
    text = "Quick FOX, 漢字 [unseen: ж]"
    ids = tokenizer(text)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == "[CLS]" and words[-1] == "[SEP]" and "quick" in words and "漢" in words and "[UNK]" in words
    encoder = TextTokenizer(tmp_path / "tokenizer")
    values, offsets = encoder.encode(pa.array([text, "", "fox " * 50]), 9)
    assert values[: offsets[1]].tolist() == [*ids[:8], ids[-1]], "cut texts keep their [SEP]"
    assert np.diff(offsets).tolist() == [9, 2, 9]


@pytest.mark.parametrize("vocab_size", [85, 150])
def test_the_same_texts_give_the_same_ids_every_time(vocab_size: int) -> None:
    """The trainer's hash maps have a new seed each time, also within one process."""
    assert len({train_wordpiece(lambda: TEXTS, vocab_size, True).to_str() for _ in range(6)}) == 1


def test_a_vocabulary_too_small_for_the_characters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size=20 has no room"):
        train_wordpiece(lambda: TEXTS, 20, True)


def test_a_given_tokenizer_is_copied_and_an_unusable_one_refused(tmp_path: Path) -> None:
    make_tokenizer(TokenizerConfig(vocab_size=150), lambda: TEXTS, tmp_path / "a")
    make_tokenizer(TokenizerConfig(path=str(tmp_path / "a")), list, tmp_path / "b")
    vocabularies = [Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")).get_vocab() for n in "ab"]
    assert vocabularies[0] == vocabularies[1]
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path=.*is not a folder"):
        make_tokenizer(TokenizerConfig(path=str(tmp_path / "none")), list, tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no usable tokenizer"):
        make_tokenizer(TokenizerConfig(path=str(tmp_path / "empty")), list, tmp_path / "d")


def test_texts_are_not_held_while_the_tokenizer_is_trained() -> None:
    def texts() -> Iterator[list[str]]:
        for chunk in range(40):
            yield [f"{chunk} {i} " + "some words that repeat " * 8 for i in range(1000)]

    one = sum(map(sys.getsizeof, next(texts())))
    tracemalloc.start()
    train_wordpiece(texts, 300, True)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one < most < 6 * one  # of 40


def test_constant_numbers_and_values_repeated_in_a_row(tmp_path: Path) -> None:
    features = {"tags": Categorical(multi=True, min_count=2).with_name("tags"), "size": Numeric().with_name("size")}
    columns = {"tags": pa.array([["x", "x"], ["y"], ["y"]], pa.list_(pa.large_string())), "size": pa.array([0.1] * 3)}
    fitted: Any = fitted_to(tmp_path / "fit", features, [pa.table(columns)])
    assert tuple(fitted["tags"].vocabulary) == ("y",), "x is in a single row"
    assert fitted["size"].mean == pytest.approx(0.1) and fitted["size"].std == 1.0
