"""Text encoders of all families, padded and packed, against transformers; sentence-transformers folders."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from bigdssm.config import TextInputs, load_config
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.evaluation.pretrained import PretrainedEncoder
from bigdssm.features import Ragged, Text, TextTokenizer
from bigdssm.features.text import NO_TOKEN
from bigdssm.features.tokenizer import FolderPrompts, prompts_in, token_difference
from bigdssm.ingest.api import make_dataset
from bigdssm.ingest.fitting import with_prompts
from bigdssm.models.encoders.pretrained import (
    build_pretrained,
    pretrained_architecture,
    pretrained_encoder,
)
from bigdssm.models.encoders.transformer import PACKABLE, TransformerEncoder
from bigdssm.models.packed import Packed, pack
from bigdssm.training.checks import check_stage
from tests.encoders import DECODERS, FAMILIES, WORDS, write_family, write_pairs
from tests.packing import within_rows

# the padding token of some families, 1 or 3, is also a word here: no code may take it for padding
TEXTS = [[2, 7, 9, 3, 1, 12, 6, 8, 14, 5, 11, 3], [2, 5, 3], [4], [2, 1, 1, 3], [3, 3, 8, 10, 3]]


def padded(texts: list[list[int]]) -> Tensor:
    width = max(map(len, texts)) + 1
    return torch.tensor([text + [NO_TOKEN] * (width - len(text)) for text in texts])


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp("family") / request.param)


def family(folder: Path) -> str:
    return folder.name


def hidden_states(folder: Path) -> list[Tensor]:
    """Return transformers' last hidden states of each text alone, without padding."""
    model, first = AutoModel.from_pretrained(folder).eval(), 0
    if family(folder) in ("xlm-roberta", "mpnet"):  # positions that do not depend on token ids
        first = model.config.pad_token_id + 1
    states = []
    for text in TEXTS:
        positions = {"position_ids": torch.arange(first, first + len(text))[None]} if first else {}
        states.append(model(input_ids=torch.tensor([text]), **positions).last_hidden_state[0].detach())
    return states


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_padded_batch_equals_the_texts_alone(folder: Path, pooling: str) -> None:
    encoder = encoder_of(folder, pooling)
    pooled = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "last": lambda h: h[-1]}[pooling]
    expected = torch.stack([pooled(states) for states in hidden_states(folder)])
    torch.testing.assert_close(encoder(padded(TEXTS)), expected, rtol=1e-4, atol=1e-5)
    eager = encoder_of(folder, pooling)
    eager.use_eager_attention()
    torch.testing.assert_close(eager.train()(padded(TEXTS)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_packed_texts_equal_padded_ones(folder: Path, pooling: str, skip: int) -> None:
    """Positions, sliding windows, causality and grouped heads, forward and backward."""
    if family(folder) not in PACKABLE:
        assert not encoder_of(folder, pooling).accepts_packed(training=False)
        pytest.skip(f"{family(folder)} adds a bias of its own to the attention")
    texts = [text for text in TEXTS if len(text) >= skip]
    tokens, plain, other = padded(texts), encoder_of(folder, pooling), encoder_of(folder, pooling)
    other.use_packing(within_rows)
    assert other.accepts_packed(training=True) is True
    given = pack(tokens, NO_TOKEN, sum(map(len, texts)), max(map(len, texts)))
    assert isinstance(given, Packed)
    weight = torch.randn(len(texts), plain.dim)
    gradients = []
    for encoder, values in ((plain, tokens), (other, given)):
        vectors = encoder(values, skip=skip)
        (vectors * weight).sum().backward()
        gradients.append((vectors.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}))
    (expected, theirs), (found, ours) = gradients
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def encoder_of(folder: Path, pooling: str) -> TransformerEncoder:
    return build_pretrained(pretrained_architecture(str(folder), pooling=pooling), str(folder)).eval()


def test_the_pooling_of_a_family(folder: Path) -> None:
    expected = "last" if family(folder) in DECODERS else "mean"
    assert pretrained_architecture(str(folder)).bigdssm["pooling"] == expected


def test_fewer_layers(folder: Path) -> None:
    encoder = TransformerEncoder(pretrained_architecture(str(folder), keep_layers=2, dropout=0.1))
    layers = [name for name, _ in encoder.named_modules() if re.search(r"layers?\.\d+$", name)]
    assert len(layers) == 2
    assert any(getattr(m, "p", 0) == 0.1 or getattr(m, "attention_dropout", 0) == 0.1 for m in encoder.modules())


SENTENCES = ["red wine", "old", "blue sea stone light small river paper green tree red wine glass", "garden house ."]


def tokens_of(folder: Path, sentences: list[str], **text: Any) -> tuple[Tensor, Text]:
    tokenizer = TextTokenizer(folder)
    feature = Text(**text).with_name("text").with_prompt("", True, tokenizer)
    column = feature.encode(pa.array(sentences, pa.large_string()), tokenizer, large=True)
    return torch.from_numpy(feature.array(Ragged(column.values.to_numpy(), column.offsets.to_numpy()))), feature


def changed_folder(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of a folder whose tokenizer.json is changed."""
    copy = folder.with_name(f"changed-{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    change(content)
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda t: t["model"]["vocab"].update(red=t["model"]["vocab"]["sea"], sea=t["model"]["vocab"]["red"]),
         "20 tokens against 20, 'red' is 12 against 5"),
        (lambda t: t["model"]["vocab"].update(new=20), "21 tokens against 20, 'new' is 20 against None"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "another normalizer"),
        (lambda t: t.update(pre_tokenizer={"type": "WhitespaceSplit"}), "another pre-tokenizer"),
        (lambda t: t.update(post_processor=None), "another order of special tokens"),
        (lambda t: t["added_tokens"][0].update(lstrip=True), "another set of special tokens"),
        (lambda t: t.update(decoder={"type": "Fuse"}, truncation=None), None),
    ],
)  # fmt: skip
def test_tokenizers_are_compared_by_the_tokens_that_they_give(
    bert: Path, change: Callable[[dict[str, Any]], object], difference: str | None
) -> None:
    other = changed_folder(bert, change)
    assert token_difference(other, bert) == difference
    modules = other.with_name("modules")  # of sentence-transformers: the transformer is in a folder
    modules.mkdir()
    other.rename(modules / "0_Transformer")
    assert token_difference(modules, bert) == difference
    shutil.rmtree(modules)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("bert", tmp_path_factory.mktemp("bert") / "bert")


def test_pretrained_weights_belong_to_the_tokens_of_the_dataset(tmp_path: Path, caplog: Any) -> None:
    """Else an encoder reads words as others; refused when a dataset is built, and when a run is validated."""
    path = write_pairs(tmp_path, "bert", pairs=60)
    pairs = {"pairs": tmp_path / "pairs.jsonl", "doc_id_column": "doc_key", "out": tmp_path / "new"}
    check_stage(load_config(path), "pretrain", 1)
    other = changed_folder(tmp_path / "bert", lambda content: content.update(normalizer={"type": "Lowercase"}))
    reason = rf"model.query.text.init={other} .* \(another normalizer\).* with data.tokenizer.path={other}"
    given = [f"model.{side}.text.init={other}" for side in ("query", "doc")]
    with pytest.raises(ConfigError, match=reason):
        check_stage(load_config(path, given), "pretrain", 1)
    with pytest.raises(ConfigError, match=reason):
        make_dataset(path, given, **pairs)
    with pytest.raises(ConfigError, match=r"that of the dataset \(trained on its texts\)"):
        make_dataset(path, ["data.tokenizer.path=null"], **pairs)
    with pytest.raises(ConfigError, match=r"prompt 'red red .* leave none of max_tokens=10"):
        make_dataset(path, [f"data.query.query.prompt={'red ' * 8}"], **pairs)
    assert not (tmp_path / "new").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a folder of weights alone
        (other / name).unlink()
    check_stage(load_config(path, given), "pretrain", 1)
    make_dataset(path, [*given, f"data.query.query.prompt={'red ' * 5}"], **pairs)
    assert "query: its prompt and special tokens leave 3 of max_tokens=10 for the text" in caplog.text


def test_truncation_keeps_the_end(folder: Path) -> None:
    """A decoder without its EOS would pool the token of a word."""
    tokens, _ = tokens_of(folder, [" ".join(WORDS)], max_tokens=6)
    whole, _ = tokens_of(folder, ["red"], max_tokens=6)
    assert tokens.shape[1] == 6
    if family(folder) != "llama":
        assert tokens[0, -1] == whole[0, -1] == 3
    if family(folder) != "qwen3":
        assert tokens[0, 0] == 2


@pytest.fixture
def sentence_transformer(folder: Path, tmp_path: Path) -> Any:
    """Return a model of all supported modules around the family, saved in `tmp_path` / st."""
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    torch.manual_seed(1)
    transformer = modules.Transformer(str(folder), max_seq_length=16)
    if transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    mode = "lasttoken" if family(folder) in DECODERS else "mean"
    parts = [
        transformer, modules.Pooling(32, mode, include_prompt=False), modules.Dense(32, 24),
        modules.Dense(24, 8, bias=False, activation_function=torch.nn.Identity()), modules.Normalize(),
    ]  # fmt: skip
    made = library.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "red : ", "passage": "wine . "})
    made.save_pretrained(str(tmp_path / "st"))
    return library.SentenceTransformer(str(tmp_path / "st"), device="cpu").eval()


def test_a_sentence_transformers_folder_is_loaded_whole(sentence_transformer: Any, tmp_path: Path) -> None:
    encoder = pretrained_encoder(str(tmp_path / "st")).eval()
    assert prompts_in(tmp_path / "st") == FolderPrompts("red : ", "wine . ", pooled=False)
    for prompt in ("", "red : "):
        tokens, feature = tokens_of(tmp_path / "st", SENTENCES, max_tokens=16, prompt=prompt, pool_prompt=not prompt)
        vectors = encoder(tokens, skip=feature.prompt_tokens)
        theirs = torch.as_tensor(sentence_transformer.encode(SENTENCES, prompt=prompt or None))
        torch.testing.assert_close(vectors, theirs, rtol=1e-5, atol=1e-5)


def test_the_prompts_of_a_folder_are_the_default(folder: Path, sentence_transformer: Any, tmp_path: Path) -> None:
    saved = tmp_path / "st"
    encoder = PretrainedEncoder(saved, max_tokens=16)
    for prompt, name in ((encoder.prompts.query, "query"), (encoder.prompts.doc, "passage")):
        theirs = torch.as_tensor(sentence_transformer.encode(SENTENCES, prompt_name=name))
        torch.testing.assert_close(encoder(SENTENCES, prompt), theirs, rtol=1e-5, atol=1e-5)
    declared = Schema({"q": Text().with_name("q")}, {"d": Text(prompt="", pool_prompt=True).with_name("d")})
    fitted = with_prompts(declared, str(saved), TextTokenizer(saved))
    assert fitted.query["q"] == replace(
        declared.query["q"], prompt="red : ", pool_prompt=False, prompt_tokens=2 + (family(folder) != "qwen3")
    )
    assert fitted.doc == declared.doc and declared.difference(fitted) is None
    other = Schema({"q": Text(prompt="wine").with_name("q")}, declared.doc)
    assert other.difference(fitted) == "query.q.prompt='wine' against 'red : '"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.LSTM", "path": "1"}], "Transformer, LSTM"),
        ("pooling.json", {"pooling_mode": "max"}, "pools by \\['max'\\]"),
        ("config.json", {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}, "never run"),
        ("config.json", {"model_type": "t5"}, "needs an encoder or a decoder"),
    ],
)
def test_models_that_are_not_supported(tmp_path: Path, file: str, content: Any, message: str) -> None:
    write_family("bert", tmp_path)
    if file == "pooling.json":
        modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_Pooling").mkdir()
        file = "1_Pooling/config.json"
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        pretrained_architecture(str(tmp_path))


def test_a_name_on_the_hub_is_loaded_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"text\.init=our/bert is not a folder, and not a model of the Hugging Face Hub"
    ):
        pretrained_architecture("our/bert")
    cached = tmp_path / "models--our--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    write_family("bert", cached / "snapshots" / ("0" * 40))
    assert pretrained_architecture("our/bert").model_type == "bert"


def test_positions_and_words_that_a_model_lacks(tmp_path: Path) -> None:
    write_family("xlm-roberta", tmp_path)
    assert pretrained_architecture(str(tmp_path), TextInputs(40, 64)).vocab_size == 40
    with pytest.raises(ConfigError, match=r"64 positions.*max_tokens: 65"):
        pretrained_architecture(str(tmp_path), TextInputs(40, 65))
    with pytest.raises(ConfigError, match=r"40 word vectors.*41 tokens"):
        pretrained_architecture(str(tmp_path), TextInputs(41, 64))
