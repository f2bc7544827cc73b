"""Fit the schema to the rows: vocabularies, normalisation, and the tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, TextTokenizer, texts_of
from bigdssm.ingest.documents import canonical_of
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.tables import RowFile, RowTable, finished_folder, ranges, read_facts, write_facts
from bigdssm.ingest.row_keys import uniform

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TRAINING_CHARACTERS = 20_000_000  # 25 million of Debian's give held-out texts as many tokens, within 0.5 %

Texts = Callable[[], Iterable[list[str]]]
"""Gives the same texts from the beginning each time that it is called; they are read twice and not held."""


def make_tokenizer(config: TokenizerConfig, texts: Texts, folder: Path) -> None:
    """Write the tokenizer that `config` asks for into `folder`; without a path it is trained on `texts`.

    Raises ConfigError where the given one cannot be used.
    """
    if config.path is not None:
        _copy(Path(config.path), folder)
        return
    tokenizer = train_wordpiece(texts, config.vocab_size, config.lowercase)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Return a BERT-like WordPiece tokenizer trained on `texts`; the same texts give the same ids every time.

    Raises ConfigError where vocab_size leaves no room for the characters of the texts.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the continuing characters (`##a`) in the order of a randomly seeded hash map, and breaks ties
    # between merges by these numbers; given in advance they, and so the whole vocabulary, come out the same.
    characters: set[str] = set()
    for chunk in _up_to(texts(), MAX_TRAINING_CHARACTERS):
        characters.update(*chunk)
    raw = sorted(characters)
    alphabet = sorted(set("".join(normalizer.normalize_str(c) for c in raw)) - {" "})
    words = {c: [word for word, _ in pre_tokenizer.pre_tokenize_str(f"a{c}a")] for c in alphabet}
    inside = [f"##{c}" for c in alphabet if len(words[c]) == 1]  # the others, such as punctuation, are always apart
    needed = len(SPECIAL_TOKENS) + len(alphabet) + len(inside)
    if vocab_size < needed:
        raise ConfigError(
            f"data.tokenizer.vocab_size={vocab_size} has no room for the {needed} characters and special tokens of the"
            " texts; raise it"
        )
    learner = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *alphabet, *inside], show_progress=False
    )
    learner.train_from_iterator(chain.from_iterable(_up_to(texts(), MAX_TRAINING_CHARACTERS)), trainer)
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=UNKNOWN))  # without the pieces as "special"
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ends = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B {SEP}", ends)
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _up_to(texts: Iterable[list[str]], characters: int) -> Iterator[list[str]]:
    for chunk in texts:
        yield chunk
        characters -= sum(map(len, chunk))
        if characters <= 0:
            return


def _copy(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer  # slow to import, and only needed here

    if not source.is_dir():
        raise ConfigError(f"data.tokenizer.path={source} is no folder; give one with a Hugging Face tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer.path={source} holds no usable tokenizer: {str(error).splitlines()[0]}"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"data.tokenizer.path={source} is not a fast tokenizer; save it with tokenizer.json first")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"data.tokenizer.path={source} has no pad token; set one and save it again")
    tokenizer.save_pretrained(str(folder))


ROWS_PER_FIT = 1 << 18  # in this order sums are made, whoever makes them
LEARNED = pa.schema(
    [("feature", pa.int32()), ("value", pa.large_string()), ("count", pa.int64()), ("place", pa.int64())]
)
SAMPLED_ROWS = 1 << 18  # of a side, whose texts the tokenizer is trained on
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class FittedSide:
    """The rows that one side of the schema is fitted to: features wait in columns `prefix`0, `prefix`1, …"""

    name: str
    table: RowTable
    prefix: str
    features: Mapping[str, Feature]

    def column(self, number: int, first: int, end: int) -> pa.Array:
        """Return rows [first, end) of the canonical feature of this number."""
        name = list(self.features)[number]
        rows = self.table.read(first, end, [f"{self.prefix}{number}"]).rename_columns(["f0"])
        return canonical_of(rows, "f", {name: self.features[name]}).column(name).combine_chunks()


def _learns(feature: Feature) -> bool:
    """Return whether the data tell a feature anything."""
    return feature.fitter() is not None or feature.vocabulary_values(pa.array([], feature.canonical_type)) is not None


def schema_to_fit(config: DataConfig, grown: Path | None, like: Path | None) -> Schema:
    """Return the schema as `config` declares it; that of the dataset that is `grown`, or `like` another one, is fitted.

    Raises ConfigError where the config declares another one.
    """
    if grown is not None and like is not None:
        raise ConfigError("--append takes the schema of the dataset that grows; leave out --like")
    declared, fitted = Schema.declared(config), grown or like
    if fitted is None:
        return declared
    schema = Schema.load(fitted)
    if difference := declared.difference(schema):
        raise ConfigError(f"the config's schema is not that of {fitted}: {difference}")
    return schema


def fit(
    engine: LocalEngine, base: Schema, config: DataConfig, sides: list[FittedSide], *,
    folder: Path, grow: bool, like: Path | None,
) -> tuple[Schema, TextTokenizer | None]:  # fmt: skip
    """Return the fitted schema and, where it has text, the encoder of its tokenizer, which comes into `folder`.

    With `grow` the schema gets what is new, and the tokenizer is there already. Where queries are documents, theirs are
    the documents' fits.
    """
    schema = base
    if like is None:
        fitted = {side.name: fit_side(engine, side, grow=grow) for side in sides}
        if base.siamese:  # each side keeps its columns
            doc = fitted["doc"]
            fitted["query"] = {name: replace(doc[name], column=own.column) for name, own in base.query.items()}
        schema = replace(base, query=base.query | fitted.get("query", {}), doc=base.doc | fitted.get("doc", {}))
    if not schema.has_text:
        return schema, None
    if not folder.exists():
        with finished_folder(engine.spool / TOKENIZER) as aside:
            if like is not None:
                shutil.copytree(like / TOKENIZER, aside, dirs_exist_ok=True)
            else:
                make_tokenizer(config.tokenizer, lambda: sampled_texts(sides), aside)
        os.replace(engine.spool / TOKENIZER, folder)
    return schema, TextTokenizer(folder)


def fit_side(engine: LocalEngine, side: FittedSide, *, grow: bool) -> dict[str, Feature]:
    """Return a side's features as its rows say."""
    if not side.table.num_rows:
        return dict(side.features)
    step = f"fit_{side.name}"
    folders = engine.map(step, ranges(side.table, ROWS_PER_FIT), partial(_learn, side), rows=side.table.num_rows)
    engine.table(step, [folder / "values.parquet" for folder in folders])
    states = list(map(read_facts, folders))
    fitted = dict(side.features)
    for number, (name, feature) in enumerate(side.features.items()):
        if fitter := feature.fitter():
            for state in states:
                fitter.merge(state[name])
            fitted[name] = fitter.fitted(feature, grow=grow)
        elif feature.vocabulary_values(pa.array([], feature.canonical_type)) is not None:
            values = _frequent(engine, step, number, feature.vocabulary_min_count)
            if values.num_rows:
                batches = (piece.column("value").combine_chunks() for piece in values.batches(columns=["value"]))
                fitted[name] = feature.with_values(engine.spool / f"{step}_{number}.arrow", batches)
    return fitted


def _frequent(engine: LocalEngine, step: str, number: int, vocabulary_min_count: int) -> RowTable:
    """Return the values that stand in enough rows, by the first place they stand at, then by the alphabet."""
    sums = f"SELECT value, sum(count) AS n, min(place) AS place FROM {step} WHERE feature = {number} GROUP BY value"
    query = f"SELECT value, place FROM ({sums}) summed WHERE n >= {vocabulary_min_count}"
    return engine.select(f"{step}_{number}", query, order="place, value")


def _learn(side: FittedSide, job: tuple[int, int], folder: Path) -> None:
    """Learn of a range of rows: states of fitters, and values with their counts and first places.

    All at once: a sum's last bits depend on where it is cut.
    """
    states = {}
    place = side.table.read(*job, ["place"]).column("place").to_numpy()
    with RowFile(folder / "values.parquet", LEARNED) as file:
        for number, (name, feature) in enumerate(side.features.items()):
            if not _learns(feature):
                continue
            column = side.column(number, *job)
            if fitter := feature.fitter():
                fitter.update(column)
                states[name] = fitter.state()
            if (found := feature.vocabulary_values(column)) is not None:
                file.add(_counted(number, found[0], place[found[1]]))
    write_facts(folder, **states)


def _counted(feature: int, values: pa.Array, place: np.ndarray) -> pa.Table:
    table = pa.table({"value": values.cast(pa.large_string()), "place": place})
    grouped = table.group_by("value", use_threads=False).aggregate([("value", "count"), ("place", "min")])
    columns = [pa.array(np.full(grouped.num_rows, feature, np.int32)), grouped["value"], grouped["value_count"]]
    return pa.Table.from_arrays([*columns, grouped["place_min"]], schema=LEARNED)


def sampled_texts(sides: list[FittedSide]) -> Iterator[list[str]]:
    """Yield texts of rows chosen by a hash of their places: of each side about SAMPLED_ROWS, or as many as fit."""
    having = [side for side in sides if texts_of(side.features)]
    for side in having:
        left, share = MAX_TRAINING_CHARACTERS // len(having), SAMPLED_ROWS / max(1, side.table.num_rows)
        numbers = [number for number, name in enumerate(side.features) if name in texts_of(side.features)]
        for first, end in ranges(side.table, ROWS_PER_FIT) if left > 0 else ():
            place = side.table.read(first, end, ["place"]).column("place").to_numpy()
            chosen = pa.array(uniform(place, "sample", 0) < share)
            for number in numbers:
                texts = side.column(number, first, end).filter(chosen).to_pylist()
                yield texts
                left -= sum(map(len, texts))
            if left <= 0:
                break
