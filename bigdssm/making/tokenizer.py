"""The dataset's tokenizer: a WordPiece trained on its texts, or a copy of a given one.

Both end as a Hugging Face fast-tokenizer folder that AutoTokenizer loads, so that models, serving and other tools read
text exactly as the shards were made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bigdssm.config import TokenizerConfig
from bigdssm.errors import ConfigError

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
