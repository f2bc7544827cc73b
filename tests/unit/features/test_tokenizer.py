"""Token ids equal those of the tokenizers library on all code paths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from bigdssm.config import TokenizerConfig
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.ingest.fitting import make_tokenizer

BLANKS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\0",
    "\u200d",
    "\u0301",
]
WORDS = [
    "Quick",
    "fox",
    "don't",
    "é",
    "e\u0301",
    "İ",
    "ΌΔΟΣ",
    "漢字",
    "한국",
    "👩\u200d💻",
    "[SEP]",
    "[sep]",
    "[MASK]",
    "a" * 120,
    "[CLS",
    "-]",
]
TEXTS = ["the quick brown fox, [unseen] don't é 漢字", "lazy dogs jump over 한국"] * 20


def nasty_texts() -> list[str]:
    random = np.random.RandomState(0)
    parts = [[random.choice(kind) for _ in range(30) for kind in (WORDS, BLANKS)] for _ in range(200)]
    return ["", " ", "\n\n", *WORDS, *("".join(some[random.randint(40) :]) for some in parts)]


def bert(folder: Path) -> None:
    make_tokenizer(TokenizerConfig(vocab_size=200), lambda: [TEXTS], folder)


def bert_with(*added: AddedToken) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        bert(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(list(added))
        tokenizer.save(str(folder / "tokenizer.json"))

    return make


def bytes_with_blanks(folder: Path) -> None:
    """Tokens start with the preceding spaces."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "make",
    [
        bert,
        bytes_with_blanks,
        bert_with(AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("lone", single_word=True)),
        bert_with(AddedToken("two words")),
        bert_with(AddedToken("\nline")),
    ],
)
def test_ids_are_the_librarys(make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("bigdssm.features.tokenizer.BYTES_PER_PIECE", 1000)
    make(tmp_path / "tokenizer")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer/tokenizer.json"))
    texts = [
        *nasty_texts(),
        "quick two words",
        "fox  <mask> fox",
        " <mask>",
        "<mask>\n",
        "a lone alone lone-",
        "the\nline",
    ]
    for max_tokens in (3, 9, 4096):
        library.enable_truncation(max_tokens)
        wanted = [encoding.ids for encoding in library.encode_batch(texts)]
        for given in (pa.array(texts, pa.large_string()), pa.array(["left out", *texts], pa.large_string()).slice(1)):
            ids, offsets = TextTokenizer(tmp_path / "tokenizer").encode(given, max_tokens)
            assert ids.dtype == np.int32
            found = [ids[start:end].tolist() for start, end in pairwise(offsets)]
            assert found == wanted
    assert TextTokenizer(tmp_path / "tokenizer").encode(pa.array([], pa.large_string()), 9)[1].tolist() == [0]
