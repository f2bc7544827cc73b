"""The cached step as a library: the gradients of one plain backward, at any ranks, chunks, ZeRO stage and engine."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigdssm
from bigdssm.config import LossConfig
from bigdssm.errors import ConfigError
from bigdssm.losses import PairCE, contrastive_loss, fps_loss
from bigdssm.losses.inputs import LossBatch
from bigdssm.models import Encoded
from bigdssm.models.two_towers import pool

from .spawn import Pool

ROWS, LENGTH, WORDS, LR = 12, 10, 40, 0.5
SHARES = {1: (12,), 2: (12, 0), 3: (5, 1, 6)}  # queries per rank: with two, one has none
PLANS = {"whole": (0, 0), "one chunk": (10_000, 0), "chunks": (30, 0), "some retained": (30, 60)}
FIRST = {"chunks": (30, 0)}


def encoder(seed: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(20)
    return model


def towers(kind: str = "") -> bigdssm.TwoTowers:
    model = bigdssm.TwoTowers(encoder(0), encoder(1), alpha=5.0, learn_alpha=True).train()
    model.doc_encoder.requires_grad_("frozen" not in kind)
    return model


def tokens(seed: int, left: bool = False) -> dict[str, Tensor]:
    """Return texts of 1 to 10 tokens, padded with an ordinary token: padding cannot be inferred from ids."""
    torch.manual_seed(seed)
    ids, length = torch.randint(0, WORDS, (ROWS, LENGTH)), torch.randint(1, LENGTH + 1, (ROWS, 1))
    mask = (torch.arange(LENGTH) < length).long()
    if left:
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def share(rank: int, world_size: int, step: int, left: bool = False) -> Any:
    """Return the rank's batch: some documents and some queries occur several times."""
    first = sum(SHARES[world_size][:rank])
    its = slice(first, first + SHARES[world_size][rank])
    query, doc = tokens(2 * step), tokens(2 * step + 1, left)
    doc_ids = torch.arange(ROWS) % 8
    doc = {name: value[doc_ids] for name, value in doc.items()}
    sides = [{name: value[its] for name, value in side.items()} for side in (query, doc)]
    return bigdssm.pair_batch(*sides, query_ids=(torch.arange(ROWS) % 9)[its], doc_ids=doc_ids[its])


def plain_steps(rank: int, world_size: int, left: bool = False, kind: str = "") -> dict[str, Tensor]:
    """Return the weights after two steps on the whole batch, by one backward each."""
    model = towers(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in (0, 1):
        batch = share(0, 1, step, left)
        encoded = model(dict(batch.query), dict(batch.doc))
        output = fps_loss(
            encoded.U, encoded.W, batch.positive, alpha=encoded.alpha, neg_bias=batch.counts.double().log(),
            query_ids=batch.query_ids, doc_ids=batch.doc_ids,
        )  # fmt: skip
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def engine_of(kind: str, model: nn.Module | None = None) -> tuple[Any, Any]:
    """Return an engine and the function that steps its optimizer."""
    model = model or towers(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    if not kind.startswith("zero"):
        engine = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return engine, step
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_optimization": {"stage": int(kind[4]), "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    if "offload" in kind:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, engine.step


def cached_steps(
    rank: int, world_size: int, kind: str, plans: dict[str, tuple[int, int]], left: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return the weights after two cached steps, by plan."""
    found = {}
    for name, (chunk_tokens, retained_tokens) in plans.items():
        engine, step = engine_of(kind)
        for number in (0, 1):
            batch = share(rank, world_size, number, left)
            bigdssm.cached_step(engine, batch, chunk_tokens=chunk_tokens, retained_tokens=retained_tokens)
            step()
        found[name] = weights_of(engine, kind)
    return found


def weights_of(engine: Any, kind: str) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in getattr(engine, "module", engine).named_parameters():
        if kind.startswith("zero3"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("module", 1)]
    + [pytest.param("ddp", ranks, marks=[] if ranks == 2 else pytest.mark.slow) for ranks in (2, 3)]
    + [
        pytest.param(f"zero{stage}", ranks, marks=[] if (stage, ranks) == (1, 2) else pytest.mark.slow)
        for stage in (0, 1, 2, 3)
        for ranks in (1, 2, 3)
    ],
)
def test_gradients_are_those_of_one_plain_backward(pools: dict[int, Pool], kind: str, world_size: int) -> None:
    (plain,) = pools[1].run(plain_steps)
    start = dict(towers().named_parameters())
    for rank, by_plan in enumerate(pools[world_size].run(cached_steps, kind, PLANS)):
        for plan, weights in by_plan.items():
            assert weights.keys() == plain.keys()
            for name, expected in plain.items():
                moved = (expected - start[name].detach()).abs().max()
                assert moved > 1e-6 or "key.bias" in name, name
                error = (weights[name] - expected).abs().max()
                assert error <= 1e-5 * max(1.0, expected.abs().max()), f"{name} of rank {rank}, {kind}, {plan}"


class HeadByLanguage(nn.Module):
    """An encoder with two heads of equal size, chosen by a row's language, and one that no row uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, input: Tensor, language: Tensor) -> Tensor:
        hidden = self.body(input).tanh()
        vectors = hidden.new_zeros(len(input), 3)
        for head in language.unique().tolist():
            vectors[language == head] = self.heads[head](hidden[language == head])
        return vectors


def steps_of_languages(
    rank: int, world_size: int, kind: str, chunk_tokens: int, languages: tuple[int, ...] = (0, 1)
) -> dict[str, Tensor]:
    """Return the weights after two steps of two batches each, whose first and second rows have other languages."""
    torch.manual_seed(0)
    engine, step = engine_of(kind, bigdssm.TwoTowers(HeadByLanguage(), nn.Linear(4, 3)))
    its = slice(8 * rank // world_size, 8 * (rank + 1) // world_size)
    language = torch.tensor(languages).repeat_interleave(4)
    for number in range(4):
        torch.manual_seed(number)
        query, doc = torch.randn(2, 8, 4)
        batch = bigdssm.pair_batch({"input": query[its], "language": language[its]}, {"input": doc[its]})
        bigdssm.cached_step(engine, batch, chunk_tokens=chunk_tokens, retained_tokens=0)
        if number % 2:
            if kind in ("module", "ddp"):
                assert getattr(engine, "module", engine).query_encoder.heads[2].weight.grad is None
            step()
    return weights_of(engine, kind)


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", pytest.param("zero0", marks=pytest.mark.slow)])
def test_parameters_of_some_ranks_and_batches_that_accumulate(pools: dict[int, Pool], kind: str) -> None:
    """A head that only one rank's rows use has its gradient on all ranks; two batches before a step are their sum."""
    plain = steps_of_languages(0, 1, "module", 0)
    for chunk_tokens in (0, 3):
        for weights in pools[2].run(steps_of_languages, kind, chunk_tokens):
            for name, expected in plain.items():
                torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5, msg=f"{name}, {chunk_tokens}")


@pytest.mark.slow
def test_batches_accumulate_at_zero_3(pools: dict[int, Pool]) -> None:
    plain = steps_of_languages(0, 1, "module", 0, (0, 0))
    for weights in pools[2].run(steps_of_languages, "zero3", 3, (0, 0)):
        for name, expected in plain.items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5)


def test_offloaded_gradients_do_not_accumulate(pools: dict[int, Pool]) -> None:
    with pytest.raises(AssertionError, match="offload_optimizer: got a second cached_step"):
        pools[2].run(steps_of_languages, "zero1 offload", 3)


@pytest.mark.parametrize("kind", ["module", "zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_one_tower_is_frozen(pools: dict[int, Pool], kind: str) -> None:
    (plain,) = pools[1].run(plain_steps, False, "frozen")
    for by_plan in pools[1 if kind == "module" else 2].run(cached_steps, f"{kind} frozen", PLANS):
        for weights in by_plan.values():
            for name, expected in plain.items():
                torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5)


def test_padding_on_the_left_is_encoded_as_it_is(pools: dict[int, Pool]) -> None:
    (plain,) = pools[1].run(plain_steps, True)
    (by_plan,) = pools[1].run(cached_steps, "module", FIRST, True)
    for name, expected in plain.items():
        torch.testing.assert_close(by_plan["chunks"][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [PairCE(), bigdssm.losses.Triplet()])
def test_a_registered_loss_and_an_engine_of_one_encoder(loss: LossConfig) -> None:
    """Hard negatives; one encoder for both sides, called by a function; vectors from plain tensors."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    query, doc = torch.randn(5, 6), torch.randn(9, 6)
    negatives = torch.tensor([[5, 6], [6, -1], [7, 8], [8, 5], [-1, -1]])
    gradients = []
    for chunk_tokens in (0, 2):
        model = nn.Linear(6, 4, bias=False)
        with torch.no_grad():
            model.weight.copy_(weight.T)
        batch = bigdssm.pair_batch({"x": query}, {"x": doc}, negatives=negatives)
        bigdssm.cached_step(
            model, batch, loss=loss, chunk_tokens=chunk_tokens, alpha=2.0,
            encode_side=lambda engine, side, inputs: engine(inputs["x"]),
        )  # fmt: skip
        assert model.weight.grad is not None
        gradients.append(model.weight.grad)
    leaf = weight.clone().requires_grad_()
    U, W = query @ leaf, doc @ leaf
    positive = torch.arange(5)
    inputs = LossBatch(U, W, positive, alpha=2.0, negatives=negatives, neg_bias=None)
    contrastive_loss(loss, inputs, columns="in_batch").loss.backward()
    assert leaf.grad is not None
    for gradient in gradients:
        torch.testing.assert_close(gradient, leaf.grad.T, rtol=1e-5, atol=1e-6)


class Dropout(nn.Module):
    """Dropout by the generator of a library."""

    def __init__(self, library: str) -> None:
        super().__init__()
        self.library = library

    def forward(self, x: Tensor) -> Tensor:
        draw = {
            "torch": torch.rand,
            "numpy": lambda shape: torch.from_numpy(np.random.rand(*shape)),
            "python": lambda shape: torch.tensor([random.random() for _ in range(shape.numel())]).view(shape),
        }[self.library]
        return x * (draw(x.shape) < 0.5)


@pytest.mark.parametrize("library", ["torch", "numpy", "python"])
def test_dropout_is_replayed(library: str) -> None:
    """A chunk that is encoded twice has one random state: the gradients are those of chunks that retain their graph."""
    found = []
    for retained in (0, 10**6):
        torch.manual_seed(1)
        model = bigdssm.TwoTowers(nn.Sequential(nn.Linear(4, 4), Dropout(library)), nn.Linear(4, 4))
        batch = bigdssm.pair_batch({"input": torch.randn(8, 4)}, {"input": torch.randn(8, 4)})
        random.seed(2)
        np.random.seed(2)
        bigdssm.cached_step(model, batch, chunk_tokens=3, retained_tokens=retained)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    for again, kept in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.BatchNorm1d(4, track_running_stats=False).eval(),
        nn.InstanceNorm1d(4, track_running_stats=True), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
    ],
)  # fmt: skip
def test_encoders_that_depend_on_the_rows_of_a_chunk_are_refused(norm: nn.Module) -> None:
    model = bigdssm.TwoTowers(nn.Sequential(nn.Linear(4, 4), norm), nn.Linear(4, 4))
    batch = bigdssm.pair_batch({"input": torch.randn(8, 4)}, {"input": torch.randn(8, 4)})
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(ConfigError, match=r"query_encoder\.1\S*: got \w+ in training mode, whose output or state"):
        bigdssm.cached_step(model, batch, chunk_tokens=3)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    if norm.training and not isinstance(norm, nn.InstanceNorm1d):  # which normalizes sequences
        norm.eval()
        bigdssm.cached_step(model, batch, chunk_tokens=3)


class Counter(nn.Module):
    """An encoder whose forward changes a buffer, in training mode or in both."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always, self.out = always, nn.Linear(4, 4)
        self.register_buffer("total", torch.tensor([torch.nan, 1.0]))
        self.register_buffer("cache", None)  # filled once, and constant from then on

    def forward(self, input: Tensor) -> Tensor:
        self.cache = torch.ones(4) if self.cache is None else self.cache
        if self.training or self.always:
            self.total = self.total + input.mean()
        return self.out(input) * self.cache


@pytest.mark.parametrize("side", ["query", "doc"])
@pytest.mark.parametrize("always", [False, True])
def test_a_buffer_that_a_forward_changes_is_refused(side: str, always: bool) -> None:
    """It is refused at every call and keeps its values; in a mode that does not change it, the model trains."""
    encoders = {"query": nn.Linear(4, 4), "doc": nn.Linear(4, 4)}
    counter = encoders[side] = Counter(always)
    model = bigdssm.TwoTowers(encoders["query"], encoders["doc"])
    batch = bigdssm.pair_batch({"input": torch.randn(8, 4)}, {"input": torch.randn(8, 4)})
    for mode in (False, True, True):
        counter.train(mode)
        if mode or always:
            with pytest.raises(ConfigError, match=rf"^{side}_encoder\.total: got a buffer that a forward of Counter"):
                bigdssm.cached_step(model, batch, chunk_tokens=3)
            assert counter.total.isnan().tolist() == [True, False] and float(counter.total[1]) == 1
        else:
            bigdssm.cached_step(model, batch, chunk_tokens=3)
    bigdssm.cached_step(model, batch, chunk_tokens=0)
    assert float(counter.total[1]) != 1


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_by_the_counts_of_ids_are_refused_in_chunks(kind: Any) -> None:
    """A trained table is refused in both modes; a frozen one, or a whole batch, is not."""
    words = kind(WORDS, 4, scale_grad_by_freq=True)
    model = bigdssm.TwoTowers(words, nn.Linear(4, 4))
    ids = torch.randint(0, WORDS, (8,) if kind is nn.Embedding else (8, 3))
    batch = bigdssm.pair_batch({"input": ids}, {"input": torch.randn(8, 4)})
    for mode in (True, False):
        with pytest.raises(ConfigError, match=rf"query_encoder: got {kind.__name__} with scale_grad_by_freq=True"):
            bigdssm.cached_step(model.train(mode), batch, chunk_tokens=3)
    bigdssm.cached_step(model, batch, chunk_tokens=0)
    assert words.weight.grad is not None
    words.requires_grad_(False)
    bigdssm.cached_step(model, batch, chunk_tokens=3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("zero0 float64", r"query_encoder\.words\.weight: got float64 at ZeRO 0"),
        ("zero3 sparse", r"query_encoder\.words: got Embedding with sparse=True and torch.float32 at ZeRO 3"),
        ("zero1 sparse float64", r"query_encoder\.words: got Embedding with sparse=True and torch.float64 at ZeRO 1"),
        ("zero1 sparse", None),
    ],
)
def test_gradients_deepspeed_cannot_reduce_are_refused(pools: dict[int, Pool], kind: str, words: str | None) -> None:
    """Elsewhere sparse weights train as one plain backward does; ZeRO 3 itself refuses float64."""
    found = pools[2].run(step_of_one_table, kind)
    if words is not None:
        assert all(re.match(words, message) for message in found), found
        return
    plain = step_of_one_table(0, 1, "module")
    for weights in found:
        for name, expected in plain.items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-6)


class Words(nn.Module):
    """The mean vector of words."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4, sparse=sparse)

    def forward(self, input: Tensor) -> Tensor:
        return self.words(input).mean(1)


def step_of_one_table(rank: int, world_size: int, kind: str) -> Any:
    """Return the weights after a step in chunks, or the message of ConfigError."""
    torch.manual_seed(0)
    model = bigdssm.TwoTowers(Words("sparse" in kind), Words("sparse" in kind))
    engine, step = engine_of(kind, model.double() if "float64" in kind else model)
    ids = torch.randint(0, WORDS, (2, ROWS, 3))
    its = slice(ROWS * rank // world_size, ROWS * (rank + 1) // world_size)
    batch = bigdssm.pair_batch({"input": ids[0, its]}, {"input": ids[1, its]})
    try:
        bigdssm.cached_step(engine, batch, chunk_tokens=3)
    except ConfigError as error:
        return str(error)
    step()
    return weights_of(engine, kind)


class SeveralTokenLists(nn.Module):
    """Two texts with masks of their own, a vector per token, and tags, whose last cells count as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words, self.box = nn.Embedding(WORDS, 8), nn.Linear(4, 8)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, boxes: Tensor, title: Tensor, title_mask: Tensor, tags: Tensor
    ) -> Tensor:
        text = ((self.words(input_ids) + self.box(boxes)) * attention_mask[..., None]).sum(1)
        return text + (self.words(title) * title_mask[..., None]).sum(1) + self.words(tags).sum(1)


def test_tokens_are_cut_by_the_mask_they_are_named_with() -> None:
    title = tokens(7, left=True)
    query = {
        **tokens(0), "boxes": torch.randn(ROWS, LENGTH, 4), "title": title["input_ids"],
        "title_mask": title["attention_mask"], "tags": torch.randint(0, WORDS, (ROWS, LENGTH)),
    }  # fmt: skip
    named = {"title_mask": ("title",), "attention_mask": ("input_ids", "boxes")}
    batch = bigdssm.pair_batch(query, {"input": torch.randn(ROWS, 8)}, tokens=named)
    gradients = []
    for chunk_tokens in (0, 30):
        model = bigdssm.TwoTowers(SeveralTokenLists(), nn.Linear(8, 8))
        torch.nn.init.eye_(model.doc_encoder.weight)
        bigdssm.cached_step(model, batch, chunk_tokens=chunk_tokens)
        gradients.append([parameter.grad for parameter in model.query_encoder.parameters()])
    for whole, in_chunks in zip(*gradients, strict=True):
        torch.testing.assert_close(in_chunks, whole, rtol=1e-4, atol=1e-5)


def test_a_loss_of_the_caller() -> None:
    model = bigdssm.TwoTowers(nn.Linear(4, 4), nn.Linear(4, 4))
    batch = bigdssm.pair_batch({"input": torch.randn(6, 4)}, {"input": torch.randn(6, 4)})

    def margin(encoded: Encoded, batch: Any) -> Any:
        assert encoded.U is not None and encoded.W is not None
        return bigdssm.losses.LossOutput((encoded.U @ encoded.W.T).diagonal().mean(), {})

    output = bigdssm.cached_step(model, batch, loss=margin, chunk_tokens=2)
    encoded = model({"input": batch.query["input"]}, {"input": batch.doc["input"]})
    assert float(output.loss) == pytest.approx(float((encoded.U * encoded.W).sum(1).mean()), rel=1e-5)


def test_documents_of_equal_ids_are_the_first_of_them() -> None:
    doc = {"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    negatives = torch.tensor([[2, -1], [3, 0]])
    batch = bigdssm.pair_batch(
        {"x": torch.ones(2)},
        doc,
        doc_ids=torch.tensor([7, 5, 7, 9]),
        negatives=negatives,
        positive=torch.tensor([2, 1]),
    )
    assert batch.doc_ids.tolist() == [5, 7, 9] and batch.doc["x"].tolist() == [2.0, 1.0, 4.0]
    assert batch.positive.tolist() == [1, 0] and batch.counts.tolist() == [1, 2, 1]
    assert batch.negatives is not None and batch.negatives.tolist() == [[1, -1], [2, 1]]


def test_pooling_by_the_mask() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padding on the right and on the left
    assert pool(hidden, mask, "mean").tolist() == [[1.0, 2.0], [9.0, 10.0]]
    assert pool(hidden, mask, "cls").tolist() == [[0.0, 1.0], [8.0, 9.0]]
    assert pool(hidden, mask, "last").tolist() == [[2.0, 3.0], [10.0, 11.0]]


IDS = [[5, 6, 7], [8, 9, 0]]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"input_ids": torch.tensor(IDS)}, "without attention_mask"),
        ({"x": torch.ones(2), "y": torch.ones(3)}, "query: got rows"),
        ({}, "query: got rows {}"),
        (None, "query: got NoneType"),
        (torch.ones(2, 3), "query: got Tensor"),
        ({"x": None}, "query.x: got NoneType"),
        ({"x": 3}, "query.x: got int"),
        ({"x": [[1, 2], [3]]}, "query.x: got list"),
        ({"input_ids": IDS, "attention_mask": [[1, 1], [1, 1]]}, r"input_ids \[2, 3\] with attention_mask \[2, 2\]"),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, r"with attention_mask \[2\]"),
        ({"input_ids": IDS, "attention_mask": [[0.0, 0.0, -1e4]] * 2}, "needs a mask .* of 0 and 1"),
    ],
)
def test_bad_inputs(query: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bigdssm.pair_batch(query, {"x": torch.ones(2)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"doc_ids": torch.ones(2)}, r"doc_ids: got torch.float32 \[2\], needs torch.int64 \[2\]"),
        ({"positive": torch.tensor([0, 2])}, "positive: got values from 0 to 2, needs rows of doc, 0 to 1$"),
        ({"negatives": [[0], [2]]}, "negatives: got values from 0 to 2, needs rows of doc, 0 to 1, or -1 for none"),
        ({"negatives": [[0], [-2]], "doc_ids": [4, 5]}, "negatives: got values from -2 to 0"),
        ({"negatives": [0, 1]}, r"negatives: got torch.int64 \[2\], needs torch.int64 \[2, k\]"),
        ({"query_ids": 7}, "query_ids: got int"),
        ({"tokens": ["input_ids"]}, "tokens: got .*, needs the names of inputs by that of their mask"),
        ({"tokens": {"attention_mask": "input_ids"}}, "tokens: got .*input_ids"),
        ({"relevance": [1.0, -1.0]}, r"relevance: got \[2\], \[1.0, -1.0\]"),
        ({"relevance": torch.ones(2, 1)}, r"relevance: got \[2, 1\]"),
    ],
)
def test_bad_ids(arguments: Any, words: str) -> None:
    side = {"x": torch.ones(2)}
    with pytest.raises(ConfigError, match=words):
        bigdssm.pair_batch(side, side, **arguments)


def test_lists_and_arrays_are_tensors() -> None:
    query = {"input_ids": IDS, "attention_mask": np.ones((2, 3), bool)}
    ids: dict[str, Any] = {"doc_ids": np.array([4, 4]), "positive": [0, 1], "negatives": [[], []]}
    batch = bigdssm.pair_batch(query, query, **ids, relevance=[1, 0])
    assert batch.query["input_ids"].tolist() == IDS and batch.doc_ids.tolist() == [4]
    assert batch.relevance.tolist() == [1.0, 0.0] and batch.negatives is not None


class Returns(nn.Module):
    """An encoder that returns its hidden states, or vectors, in a form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.words, self.form = nn.Embedding(WORDS, 4), form

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.form(self.words(input_ids))


@pytest.mark.parametrize(
    "form",
    [
        lambda hidden: {"last_hidden_state": hidden},
        lambda hidden: (hidden, None),
        lambda hidden: {"token_embeddings": hidden, "sentence_embedding": pool(hidden, torch.ones(2, 3), "mean")},
        lambda hidden: pool(hidden, torch.ones(2, 3), "mean"),
    ],
)
def test_outputs_of_encoders(form: Any) -> None:
    inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(2, 3)}
    model = bigdssm.TwoTowers(Returns(form), Returns(lambda hidden: hidden))
    model.doc_encoder.load_state_dict(model.query_encoder.state_dict())
    encoded = model(inputs, inputs)
    torch.testing.assert_close(encoded.U, encoded.W)


@pytest.mark.parametrize(
    ("form", "got"),
    [
        (lambda hidden: None, "got NoneType"),
        (lambda hidden: {"v": hidden}, "got dict"),
        (lambda hidden: (), "got tuple"),
        (lambda hidden: hidden[:1, 0], r"got \[1, 4\], needs vectors \[2, D\]"),
        (lambda hidden: hidden[:, :2], r"attention_mask of query: got \[2, 3\], needs \[2, 2\]"),
    ],
)
def test_bad_outputs_of_encoders(form: Any, got: str) -> None:
    side = {"input_ids": IDS, "attention_mask": [[1, 1, 1]] * 2}
    batch = bigdssm.pair_batch(side, side)
    with pytest.raises(ConfigError, match=got):
        bigdssm.cached_step(bigdssm.TwoTowers(Returns(form), Returns(form)), batch, chunk_tokens=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chunk_tokens": -1}, "chunk_tokens: got -1, needs an integer of at least 0"),
        ({"chunk_tokens": 2.5}, "chunk_tokens: got 2.5"),
        ({"chunk_tokens": None}, "chunk_tokens: got None"),
        ({"chunk_tokens": 4, "retained_tokens": -1}, "retained_tokens: got -1"),
        ({"chunk_tokens": 4, "loss": "fps"}, "loss: got 'fps'"),
        ({"chunk_tokens": 4, "engine": nn.Identity()}, "engine: got Identity without parameters"),
        ({"chunk_tokens": 4, "encode_side": lambda *_: None}, "encode_side: got NoneType, needs vectors"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    engine = arguments.pop("engine", None) or bigdssm.TwoTowers(nn.Linear(2, 2), nn.Linear(2, 2))
    side = {"input": torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=words):
        bigdssm.cached_step(engine, bigdssm.pair_batch(side, side), **arguments)
    with pytest.raises(ConfigError, match=r"pooling='max', .* one of mean, cls, last"):
        bigdssm.TwoTowers(nn.Linear(2, 2), nn.Linear(2, 2), pooling="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_is_rejected(pools: dict[int, Pool], version: int) -> None:
    assert all("needs DeepSpeed" in message for message in pools[2].run(step_under_fsdp, version))


def step_under_fsdp(rank: int, world_size: int, version: int) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model: Any = bigdssm.TwoTowers(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    if version == 1:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(model.query_encoder)
    side = {"input": torch.ones(2, 2)}
    with pytest.raises(ConfigError) as error:
        bigdssm.cached_step(model, bigdssm.pair_batch(side, side), chunk_tokens=0)
    return str(error.value)
