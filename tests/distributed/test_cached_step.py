"""The cached step as a library: the gradients of one plain backward, at any ranks, chunks, ZeRO stage and engine."""

from __future__ import annotations

from typing import Any

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


def engine_of(kind: str) -> tuple[Any, Any]:
    """Return an engine and the function that steps its optimizer."""
    model = towers(kind)
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
        module = getattr(engine, "module", engine)
        weights = {}
        for parameter_name, parameter in module.named_parameters():
            if kind.startswith("zero3"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    weights[parameter_name] = parameter.detach().clone()
            else:
                weights[parameter_name] = parameter.detach().clone()
        found[name] = weights
    return found


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("module", 1)]
    + [pytest.param("ddp", ranks, marks=[] if ranks == 2 else pytest.mark.slow) for ranks in (2, 3)]
    + [
        pytest.param(f"zero{stage}", ranks, marks=[] if (stage, ranks) in ((1, 2), (3, 2)) else pytest.mark.slow)
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


@pytest.mark.parametrize("loss", [PairCE(), bigdssm.losses.Sigmoid()])
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


def test_dropout_is_replayed() -> None:
    """A chunk that is encoded twice has one random state: the gradients are those of chunks that retain their graph."""
    found = []
    for retained in (0, 10**6):
        model = bigdssm.TwoTowers(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 4))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        batch = bigdssm.pair_batch({"input": torch.randn(8, 4)}, {"input": torch.randn(8, 4)})
        torch.manual_seed(2)
        bigdssm.cached_step(model, batch, chunk_tokens=3, retained_tokens=retained)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    for again, kept in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, {"x": torch.ones(2)}), "without attention_mask"),
        (({"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.ones(2)}), "query: got rows"),
        (({}, {"x": torch.ones(2)}), "query: got rows {}"),
    ],
)
def test_bad_inputs(arguments: tuple[Any, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bigdssm.pair_batch(*arguments)


def test_bad_ids() -> None:
    side = {"x": torch.ones(2)}
    with pytest.raises(ConfigError, match=r"doc_ids: got torch.float32 \[2\], needs torch.int64 \[2\]"):
        bigdssm.pair_batch(side, side, doc_ids=torch.ones(2))
    with pytest.raises(ConfigError, match="positive: got values up to 2, needs rows of doc, 0 to 1"):
        bigdssm.pair_batch(side, side, positive=torch.tensor([0, 2]))


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
