"""Fitting the schema to rows: vocabularies, normalization, and the tokenizer."""

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
from bigdssm.dataset.schema import Schema, uniform
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, TextTokenizer, texts_of
from bigdssm.features.tokenizer import FolderPrompts, prompts_in
from bigdssm.ingest.documents import DistinctDocuments, canonical_columns
from bigdssm.ingest.engines import (
    LocalEngine,
    RowFile,
    RowTable,
    finished_folder,
    ranges,
    read_facts,
    write_facts,
)
from bigdssm.utils.log import get_logger

log = get_logger(__name__)

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TRAINING_CHARACTERS = 20_000_000  # more changes the token count of held-out Debian texts by less than 0.5 %

Texts = Callable[[], Iterable[list[str]]]
"""Returns a new iterator over the same texts at each call; texts are read twice instead of held in memory."""
ROWS_PER_FIT = 1 << 18  # fixes the order of floating-point sums
LEARNED = pa.schema(
    [("feature", pa.int32()), ("value", pa.large_string()), ("count", pa.int64()), ("place", pa.int64())]
)
SAMPLED_ROWS = 1 << 18  # per side, for the training of the tokenizer
TOKENIZER = "tokenizer"


def make_tokenizer(config: TokenizerConfig, texts: Texts, folder: Path) -> None:
    """Write the tokenizer to `folder`: a copy of `config.path`, else trained on `texts`.

    Raises ConfigError: the tokenizer at `config.path` is unusable.
    """
    if config.path is not None:
        from transformers import AutoTokenizer  # a slow import

        where = f"data.tokenizer.path={config.path}"
        if not Path(config.path).is_dir():
            raise ConfigError(f"{where} is not a folder in {Path.cwd()}; give one with a Hugging Face tokenizer")
        try:
            copied = AutoTokenizer.from_pretrained(config.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where} holds no usable tokenizer: {str(error).splitlines()[0]}") from None
        if not getattr(copied, "is_fast", False):
            raise ConfigError(f"{where} is not a fast tokenizer; save it with tokenizer.json first")
        copied.save_pretrained(str(folder))
        return
    tokenizer = train_wordpiece(texts, config.vocab_size, config.lowercase)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "cls_token": CLS,
        "sep_token": SEP,
        "mask_token": MASK,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Train a BERT-like WordPiece tokenizer on `texts`, deterministically.

    Raises ConfigError: vocab_size is smaller than the alphabet of the texts.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers continuing characters (`##a`) in the order of a randomly seeded hash map, and breaks ties of
    # merges by these numbers; passing them explicitly makes the vocabulary deterministic.
    characters: set[str] = set()
    for chunk in _up_to(texts(), MAX_TRAINING_CHARACTERS):
        characters.update(*chunk)
    alphabet = sorted(set("".join(normalizer.normalize_str(c) for c in sorted(characters))) - {" "})
    words = {c: [word for word, _ in pre_tokenizer.pre_tokenize_str(f"a{c}a")] for c in alphabet}
    # characters that occur inside a word; others, such as punctuation, are always separate tokens
    inside = [f"##{c}" for c in alphabet if len(words[c]) == 1]
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
    # a new tokenizer: the learner has the alphabet as special tokens
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token=UNKNOWN))
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


@dataclass(frozen=True)
class FittedSide:
    """The rows to fit one side of the schema to, with columns `prefix`0, `prefix`1, …"""

    name: str
    table: RowTable
    prefix: str
    features: Mapping[str, Feature]
    first: int = 0  # number of the first column

    def column(self, number: int, first: int, end: int) -> pa.Array:
        """Return rows [first, end) of a canonical feature, by number."""
        name = list(self.features)[number]
        rows = self.table.read(first, end, [f"{self.prefix}{self.first + number}"]).rename_columns(["f0"])
        return canonical_columns(rows, "f", {name: self.features[name]}).column(name).combine_chunks()


def schema_to_fit(config: DataConfig, grown: Path | None, like: Path | None) -> Schema:
    """Return the declared schema, or the fitted one of `grown` (append) or `like` (reuse).

    Raises ConfigError: the config declares another schema.
    """
    if grown is not None and like is not None:
        raise ConfigError("--append uses the schema of the existing dataset; leave out --like")
    declared, fitted = Schema.declared(config), grown or like
    if fitted is None:
        return declared
    schema = Schema.load(fitted)
    if like is not None and not schema.filter:  # columns that only filter can be added
        schema = replace(schema, filter=declared.filter)
    if difference := declared.difference(schema):
        raise ConfigError(f"the config's schema is not that of {fitted}: {difference}")
    return schema


def document_sides(
    engine: LocalEngine, base: Schema, documents: DistinctDocuments, train: RowTable | None = None
) -> list[FittedSide]:
    """Return the sides of the catalogue: features of `doc` are fitted to `train`, those of `filter` to all documents.

    `train` None: both are fitted to all documents.
    """
    all_documents = documents.table if documents.versions is None else documents.versions
    if documents.changed is not None and documents.versions is None and (train is None or base.filter):
        query = "SELECT * FROM unique_documents"  # new documents and the new versions of existing ones
        all_documents = engine.select("fitted_documents", query, order="place, doc_id")
    doc = FittedSide("doc", all_documents if train is None else train, "d", base.doc)
    return [doc, FittedSide("filter", all_documents, "d", base.filter, len(base.doc))] if base.filter else [doc]


def of_tables(schema: Schema, config: DataConfig) -> Schema:
    """Return the schema to read tables with: every table has matrices of its own, which the config names."""
    declared = Schema.declared(config)
    query = {name: feature.of_table(declared.query[name]) for name, feature in schema.query.items()}
    doc = {name: feature.of_table(declared.doc[name]) for name, feature in schema.doc.items()}
    return replace(schema, query=query, doc=doc)


def fit(
    engine: LocalEngine, base: Schema, config: DataConfig, sides: list[FittedSide], *,
    folder: Path, grow: bool, like: Path | None,
) -> tuple[Schema, TextTokenizer | None]:  # fmt: skip
    """Fit the schema; with text features, also write and return the tokenizer.

    With `grow` the schema is extended, and the existing tokenizer is used. For siamese models, queries get the fitted
    document features.
    """
    sides_to_fit = sides
    if like is not None:
        sides_to_fit = [side for side in sides if side.name == "filter" and not Schema.load(like).filter]
    fitted = {side.name: fit_side(engine, side, grow=grow) for side in sides_to_fit}
    schema = replace(base, filter=base.filter | fitted.get("filter", {}))
    if like is None:
        if base.siamese:  # each side keeps its source columns
            doc = fitted["doc"]
            fitted["query"] = {name: replace(doc[name], column=query.column) for name, query in base.query.items()}
        query, doc, event = (getattr(base, side) | fitted.get(side, {}) for side in ("query", "doc", "event"))
        schema = replace(schema, query=query, doc=doc, event=event)
    if not schema.has_text:
        return schema, None
    if not folder.exists():
        with finished_folder(engine.spool / TOKENIZER) as unfinished:
            if like is not None:
                shutil.copytree(like / TOKENIZER, unfinished, dirs_exist_ok=True)
            else:
                make_tokenizer(config.tokenizer, lambda: sampled_texts(sides), unfinished)
        os.replace(engine.spool / TOKENIZER, folder)
    tokenizer = TextTokenizer(folder)
    schema = with_prompts(schema, config.tokenizer.path, tokenizer)
    for name, text in [feature for features in schema.sides.values() for feature in texts_of(features).items()]:
        if text.prompt and (left := text.text_tokens(tokenizer)) < text.max_tokens / 2:
            log.warning(
                "text feature %s: its prompt and special tokens leave %d of max_tokens=%d for the text", name, left,
                text.max_tokens,
            )  # fmt: skip
    return schema, tokenizer


def with_prompts(schema: Schema, pretrained: str | None, tokenizer: TextTokenizer) -> Schema:
    """Return the schema with the prompts of its texts, by default those of the folder `pretrained`.

    Raises ConfigError: a prompt leaves no token for its text.
    """
    prompts = FolderPrompts() if pretrained is None else prompts_in(Path(pretrained))

    def on_side(features: Mapping[str, Feature], prompt: str) -> dict[str, Feature]:
        texts = texts_of(features)
        return {
            **features,
            **{name: text.with_prompt(prompt, prompts.pooled, tokenizer) for name, text in texts.items()},
        }

    query_prompt = prompts.doc if schema.siamese else prompts.query
    return replace(schema, query=on_side(schema.query, query_prompt), doc=on_side(schema.doc, prompts.doc))


def fit_side(engine: LocalEngine, side: FittedSide, *, grow: bool) -> dict[str, Feature]:
    """Fit the features of one side to its rows."""
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
            # the values with enough rows, in order of first occurrence, then alphabetically
            counted = f"SELECT value, sum(count) AS n, min(place) AS place FROM {step} WHERE feature = {number}"
            query = f"SELECT value, place FROM ({counted} GROUP BY value) c WHERE n >= {feature.vocabulary_min_count}"
            values = engine.select(f"{step}_{number}", query, order="place, value")
            if values.num_rows:
                batches = (piece.column("value").combine_chunks() for piece in values.batches(columns=["value"]))
                fitted[name] = feature.with_values(engine.spool / f"{step}_{number}.arrow", batches)
    return fitted


def _learn(side: FittedSide, job: tuple[int, int], folder: Path) -> None:
    """Fit to a range of rows: states of fitters, and values with counts and first ordinals.

    The range is not divided further, because the last bits of a sum depend on the division.
    """
    states = {}
    ordinals = side.table.read(*job, ["place"]).column("place").to_numpy()
    with RowFile(folder / "values.parquet", LEARNED) as file:
        for number, (name, feature) in enumerate(side.features.items()):
            fitter = feature.fitter()
            if fitter is None and feature.vocabulary_values(pa.array([], feature.canonical_type)) is None:
                continue
            column = side.column(number, *job)
            if fitter is not None:
                fitter.update(column)
                states[name] = fitter.state()
            if (counted := feature.vocabulary_values(column)) is not None:
                values, rows = counted
                table = pa.table({"value": values.cast(pa.large_string()), "place": ordinals[rows]})
                grouped = table.group_by("value", use_threads=False).aggregate([("value", "count"), ("place", "min")])
                numbers = pa.array(np.full(grouped.num_rows, number, np.int32))
                columns = [numbers, grouped["value"], grouped["value_count"], grouped["place_min"]]
                file.add(pa.Table.from_arrays(columns, schema=LEARNED))
    write_facts(folder, **states)


def sampled_texts(sides: list[FittedSide]) -> Iterator[list[str]]:
    """Yield the texts of about SAMPLED_ROWS rows per side, by a hash; about MAX_TRAINING_CHARACTERS at most in all."""
    sides_with_text = [side for side in sides if texts_of(side.features)]
    for side in sides_with_text:
        budget = MAX_TRAINING_CHARACTERS // len(sides_with_text)
        share = SAMPLED_ROWS / max(1, side.table.num_rows)
        numbers = [number for number, name in enumerate(side.features) if name in texts_of(side.features)]
        for first, end in ranges(side.table, ROWS_PER_FIT) if budget > 0 else ():
            ordinals = side.table.read(first, end, ["place"]).column("place").to_numpy()
            chosen = pa.array(uniform(ordinals, "sample", 0) < share)
            for number in numbers:
                texts = side.column(number, first, end).filter(chosen).to_pylist()
                yield texts
                budget -= sum(map(len, texts))
            if budget <= 0:
                break
