"""The dual encoder: shapes, padding, missing values, the scalars of the score."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig

from bigdssm.config import ModelConfig, TablesConfig, TowerConfig
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import Categorical, History, Numeric, Text, Vocabulary
from bigdssm.models import ALPHA_MAX, DualEncoder, new_model, use_eager_attention
from bigdssm.models.declarations import Sasrec, Transformer
from bigdssm.models.encoders.transformer import TransformerEncoder

QUERY = {
    "history": History(of="item", max_items=6).with_name("history"),
    "gender": Categorical(vocabulary=Vocabulary.of(("f", "m"))).with_name("gender"),
    "age": Numeric(mean=30.0, std=10.0).with_name("age"),
}
DOC = {
    "item": Categorical(vocabulary=Vocabulary.of("abcdefgh")).with_name("item"),
    "genres": Categorical(multi=True, vocabulary=Vocabulary.of(("x", "y"))).with_name("genres"),
    "title": Text(max_tokens=16).with_name("title"),
}
CONFIG = ModelConfig(
    dim=32,
    beta="document",
    query=TowerConfig(history=Sasrec(layers=2)),
    doc=TowerConfig(text=Transformer(layers=1, hidden=32)),
)


def model(**changes: object) -> DualEncoder:
    torch.manual_seed(0)
    return new_model(replace(CONFIG, **changes), Schema(QUERY, DOC), vocab_size=50).eval()  # type: ignore[arg-type]


def query(history: list[list[int]]) -> dict[str, torch.Tensor]:
    rows = len(history)
    return {
        "history": torch.tensor(history),
        "gender": torch.full((rows,), 2),
        "age": torch.full((rows,), 25.0),
    }


def doc(titles: list[list[int]], genres: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        "item": torch.arange(2, 2 + len(titles)),
        "genres": torch.tensor(genres),
        "title": torch.tensor(titles),
    }


def test_shapes_and_norms() -> None:
    encoded = model()(query([[2, 3, 0], [0, 0, 0]]), doc([[1, 2], [3, -1]], [[2, 3], [0, 0]]))
    assert encoded.U is not None and encoded.W is not None and encoded.beta is not None
    assert encoded.U.shape == (2, 32) and encoded.W.shape == (2, 32)
    assert encoded.beta.shape == (2,) and encoded.alpha.shape == (1,)
    torch.testing.assert_close(encoded.U.norm(dim=1), torch.ones(2))
    assert not torch.allclose(model(score="dot")(query([[2, 3, 0]])).U.norm(dim=1), torch.ones(1))


def test_norms_are_1_in_float32_under_autocast() -> None:
    """Rounded to bfloat16, a norm is off by up to 0.4 %, and with it all scores of a vector."""
    with torch.autocast("cpu", torch.bfloat16):
        U = model()(query([[2, 3, 0], [4, 0, 0], [5, 6, 7]])).U
    assert U is not None and U.dtype == torch.float32
    torch.testing.assert_close(U.norm(dim=1), torch.ones(3), rtol=1e-6, atol=0)


def test_padding_changes_nothing() -> None:
    dual = model()
    short = dual(query([[2, 3]]), doc([[1, 2]], [[2]]))
    long = dual(query([[2, 3, 0, 0]]), doc([[1, 2, -1, -1, -1]], [[2, 0, 0]]))
    torch.testing.assert_close(short.U, long.U)
    torch.testing.assert_close(short.W, long.W)


def test_the_newest_item_and_the_order_matter_and_later_rows_do_not() -> None:
    dual = model()
    vectors = dual(query([[2, 3, 4], [3, 2, 4], [2, 3, 5]])).U
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-5)
    assert not torch.allclose(vectors[0], vectors[2], atol=1e-5)
    torch.testing.assert_close(dual(query([[2, 3, 4]])).U[0], vectors[0])


def test_ages_count_from_the_newest_item() -> None:
    encoder = model().query_tower.encoders["history"]
    zeros, length = torch.zeros(2, 3, encoder.positions.embedding_dim), torch.tensor([[3], [1]])
    added = encoder._add_positions(zeros, torch.arange(3), length)
    torch.testing.assert_close(added, encoder.positions.weight[torch.tensor([[3, 2, 1], [1, 0, 0]])])


def test_a_missing_number_is_not_the_mean() -> None:
    dual = model()
    features = query([[2], [2], [2]])
    features["age"] = torch.tensor([float("nan"), 30.0, 20.0])
    vectors = dual(features).U
    assert vectors.isfinite().all()
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-5)
    assert not torch.allclose(vectors[1], vectors[2], atol=1e-5)


def test_a_history_shares_the_documents_table() -> None:
    dual = model()
    dual(query([[2, 3]])).U.sum().backward()
    touched = dual.tables.tables["doc_item"].weight.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == [2, 3]


def test_alpha_is_clamped_and_comes_back_from_the_clamp() -> None:
    dual = model(alpha_init=150.0)
    for sign, moves in ((1.0, True), (-1.0, False)):  # descent on +alpha lowers it, on -alpha would raise it
        dual.zero_grad()
        alpha = dual(query([[2]])).alpha
        assert alpha.item() == ALPHA_MAX
        (sign * alpha.sum()).backward()
        assert bool(dual.log_alpha.grad.abs().sum() > 0) is moves


def test_a_residual_needs_the_models_width() -> None:
    tower = replace(CONFIG.doc, residual="item", embedding_dim=16)
    with pytest.raises(ConfigError, match=r"model\.doc\.residual=item has width 16, but model\.dim=32"):
        model(doc=tower)
    with pytest.raises(ConfigError, match="is no doc feature"):
        model(doc=replace(CONFIG.doc, residual="itme"))


def test_a_residual_is_no_longer_than_its_limit() -> None:
    """A longer one is scaled, a shorter one stays, and an unknown id adds nothing."""
    tower = model(doc=replace(CONFIG.doc, residual="item", embedding_dim=32, residual_limit=0.5)).doc_tower
    free = model(doc=replace(CONFIG.doc, residual="item", embedding_dim=32)).doc_tower
    documents = doc([[1, 2], [3, 0], [4, 0]], [[2, 3], [0, 0], [2, 0]])
    documents["item"][2] = 1
    with torch.no_grad():
        table = tower.encoders["item"]._tables[0].tables["doc_item"].weight
        free.encoders["item"]._tables[0].tables["doc_item"].weight.zero_()
        table[2] *= 1000
        content = free(documents)
        added = tower(documents) - content
    ratio, plain = added.norm(dim=1) / content.norm(dim=1), table[documents["item"]]
    assert plain[2].norm() > 0
    assert ratio[0].item() == pytest.approx(0.5, abs=1e-4) and 0 < ratio[1] < 0.5 and ratio[2] == 0
    torch.testing.assert_close(torch.nn.functional.normalize(added[:2]), torch.nn.functional.normalize(plain[:2]))
    torch.testing.assert_close(added[1], plain[1], rtol=1e-4, atol=1e-6)
    tower(documents).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in tower.parameters())
    with pytest.raises(
        ConfigError, match=r"model\.doc\.residual_limit=0\.5 needs a single-valued categorical residual"
    ):
        model(doc=replace(CONFIG.doc, residual_limit=0.5))
    limited = replace(CONFIG.doc, residual="item", embedding_dim=32, residual_limit=0.5)
    with pytest.raises(ConfigError, match=r"residual_limit=0\.5: the table of doc\.item is sharded"):
        model(doc=limited, tables=TablesConfig(rows=("doc.item",)))


def test_beta_is_per_document_or_none() -> None:
    documents = doc([[1, 2], [3, 0], [4, 0]], [[2, 3], [0, 0], [2, 0]])
    per_document = model(beta="document")
    assert per_document(doc=documents).beta.shape == (3,) and per_document.beta_head is not None
    assert model(beta="none")(doc=documents).beta is None and model(beta="none").beta_head is None


def test_shared_text_is_one_encoder() -> None:
    schema = Schema({"words": replace(DOC["title"], name="words")}, {"title": DOC["title"]})
    shared = new_model(replace(CONFIG, share_text=True), schema, vocab_size=50)
    apart = new_model(CONFIG, schema, vocab_size=50)
    assert list(shared.text) == ["shared"] and list(apart.text) == ["query", "doc"]


def test_plain_attention_is_for_training_alone() -> None:
    fused, plain = model(), model()
    use_eager_attention(plain)
    (encoder,) = (part for part in plain.modules() if isinstance(part, TransformerEncoder))
    batch = doc([[1, 2, 0], [3, 0, 0]], [[2, 3], [0, 0]])
    for mode, attention in ((True, "eager"), (False, "sdpa"), (True, "eager")):
        plain.train(mode)
        assert encoder.transformer.config._attn_implementation == attention
    torch.testing.assert_close(plain.eval()(doc=batch).W, fused(doc=batch).W)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_text_is_encoded_as_with_the_mask_that_transformers_makes(attention: str) -> None:
    encoder = TransformerEncoder(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    encoder.transformer.set_attn_implementation(attention)
    tokens = torch.tensor([[7, 3, 9, 4], [5, 6, -1, -1], [-1, -1, -1, -1]])
    for some in (tokens, tokens[:1]):  # with padding, and without any
        ids, mask = some.clamp(min=0), some >= 0
        expected = encoder.eval().transformer(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        hidden = encoder.transformer(input_ids=ids, attention_mask=encoder._attention_mask(mask)).last_hidden_state
        torch.testing.assert_close(hidden[some >= 0], expected[some >= 0], rtol=1e-6, atol=1e-6)
    shorter = encoder(tokens[1:2, :2])
    torch.testing.assert_close(encoder(tokens)[1:2], shorter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: x[:, :-1], r"\[2, 31\]"),
        (lambda x: x[:1], r"\[1, 32\]"),
        (lambda x: x[:, None], r"\[2, 1, 32\]"),
        (lambda x: (x,), "a tuple"),
        (lambda x: {"vectors": x}, "a dict"),
    ],
)
def test_a_part_that_returns_another_shape_is_named(output: Any, got: str) -> None:
    queries = query([[2, 3, 0], [0, 0, 0]])
    for where, needed in (("encoders.history", r"\[2, 32\]"), ("encoders.history.layers.0", r"\[2, 4, 32\]")):
        built = model()
        part = built.query_tower.get_submodule(where)
        part.register_forward_hook(lambda module, given, result: output(result))
        needs = rf"bigdssm\.models\.\S+\.{type(part).__name__}\.forward returned .*, needs a tensor {needed}"
        with pytest.raises(ConfigError, match=needs) as error:
            built(queries)
        assert where.endswith("0") or re.search(f"returned {got},", str(error.value))
