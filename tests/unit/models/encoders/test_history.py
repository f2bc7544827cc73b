"""Histories: many queries per pass, causality, for all blocks and kinds of positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from bigdssm.config import (
    HISTORY_BLOCKS,
    Config,
    DataConfig,
    HistoryEncoderConfig,
    ModelConfig,
    RunConfig,
    TowerConfig,
    check_config,
    check_many_queries,
)
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import Categorical, History, Numeric, Timestamp, Vocabulary
from bigdssm.features.base import ITEM_ROW
from bigdssm.features.event_time import UNKNOWN_TIME
from bigdssm.models import DualEncoder, QueryPositions, new_model, use_eager_attention
from bigdssm.models.blocks import AttentionContext, LowPassBlock
from bigdssm.models.declarations import Sasrec

NUM_ITEMS, MAX_ITEMS, WIDTH = 20, 9, 8
QUERY = {
    "history": History(of="item", max_items=MAX_ITEMS).with_name("history"),
    "age": Numeric(mean=30.0, std=10.0).with_name("age"),
}
EVENT = {
    "action": Categorical(vocabulary=Vocabulary.of(("view", "buy"))).with_name("action"),
    "price": Numeric(mean=5.0, std=2.0).with_name("price"),
    "when": Timestamp().with_name("when"),
}
ACTIONS = torch.tensor([[2, 3, 0, 3, 2, 2, 3], [3, 3, 2, 1, 0, 0, 0], [0] * 7, [2, 2, 3, 3, 2, 0, 0]])
PRICES = torch.where(ACTIONS == 0, torch.nan, ACTIONS + torch.arange(7.0))
# Seconds to weeks apart, in microseconds; one time goes back.
SINCE_START = torch.tensor([[0, 5, 70, 65, 7200, 10**5, 2 * 10**6], [3, 4, 5, 10**5, 0, 0, 0], [0] * 7, [9] * 7])
START = 1_700_000_000_123_457
TIMES = START + SINCE_START * 10**6
DOC = {"item": Categorical(vocabulary=Vocabulary.of(map(str, range(NUM_ITEMS - 2)))).with_name("item")}
ROWS = torch.tensor([[2, 3, 4, 5, 6, 7, 8], [9, 2, 9, 1, 0, 0, 0], [0] * 7, [5, 5, 5, 5, 5, 0, 0]])
LENGTHS = [7, 4, 0, 5]

MANY = [  # every block with all positions that support many queries per pass
    *((block, positions) for block in ("sasrec", "gated", "lowpass") for positions in ("relative", "rotary")),
    *((block, "none") for block in ("sasrec", "gated", "lowpass")),
]
ALL = [*MANY, ("sasrec", "age"), ("gated", "age"), ("lowpass", "age")]
every = pytest.mark.parametrize(("block", "positions"), ALL)
every_many = pytest.mark.parametrize(("block", "positions"), MANY)
every_timed = pytest.mark.parametrize(
    ("block", "positions", "times"),
    [*((block, positions, "none") for block, positions in MANY), ("sasrec", "rotary", "rotary"),
     ("gated", "relative", "rotary"), ("lowpass", "relative", "rotary")],
)  # fmt: skip


def model(
    block: Any,
    positions: Any,
    layers: int = 2,
    dropout: float = 0.0,
    event: dict[str, Any] | None = None,
    request: tuple[str, ...] = (),
    **history: Any,
) -> DualEncoder:
    """A model in which every parameter affects the output."""
    given = {"positions": positions, "layers": layers, "dropout": dropout, "item_dropout": dropout, **history}
    encoder = HISTORY_BLOCKS.read("model.query.history", {"block": block, **given})
    config = ModelConfig(
        dim=6, score="dot", query=TowerConfig(mlp=(7,), history=encoder), doc=TowerConfig(embedding_dim=WIDTH)
    )
    torch.manual_seed(0)
    made = new_model(config, Schema(QUERY, DOC, event=event or {}, request=request))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for table in made.tables.tables.values():
            table.weight[0] = 0  # type: ignore[index, operator]
    if made.content_ids:
        made.set_contents(torch.cat([torch.zeros(1, 6), torch.randn(8, 6)]))
    return made


OF_EVENTS, ROW = ("history.action", "history.price", "history.when"), f"history.{ITEM_ROW}"


def query(rows: Tensor) -> dict[str, Tensor]:
    """Features of rows [R, T], with those of their events, which models without event features do not read."""
    more = (0, rows.shape[1] - ACTIONS.shape[1])
    of_events = (torch.nn.functional.pad(values[: len(rows)], more) for values in (ACTIONS, PRICES, TIMES))
    events = dict(zip(OF_EVENTS, of_events, strict=True))
    events[ROW] = torch.where(rows > 0, rows * 3 % 7 + 1, 0)
    return {"history": rows, **events, "age": torch.linspace(10.0, 60.0, 4)[: len(rows)]}


def all_query_positions(seed: int = 0) -> QueryPositions:
    """Every position of every row, shuffled."""
    pairs = [(row, seen) for row, length in enumerate(LENGTHS) for seen in range(length + 1)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    row, seen = torch.tensor(pairs)[order].T
    return QueryPositions(row, seen)


def gradients(made: DualEncoder, vectors: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    weights = torch.linspace(-1, 1, vectors.numel()).view_as(vectors)
    (vectors * weights).sum().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_one_pass_is_many(
    made: DualEncoder, query_positions: QueryPositions, requests: dict[str, Tensor] | None = None
) -> Tensor:
    """Return the vectors of the queries, with the `requests` of each, after a comparison with a pass for each."""
    requests, features, alone = requests or {}, query(ROWS), []
    together = made({**features, **requests}, query_positions=query_positions).U
    for number, (row, seen) in enumerate(zip(*map(Tensor.tolist, query_positions[:2]), strict=True)):
        lists = {name: features[name][row : row + 1, :seen] for name in ("history", *OF_EVENTS, ROW)}
        own = {name: values[number : number + 1] for name, values in requests.items()}
        alone.append(made({**lists, **own, "age": features["age"][row : row + 1]}).U)
    apart = torch.cat(alone)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert together.std(dim=0).min() > 0.01, "the queries are hardly different"
    ours, theirs = gradients(made, together), gradients(made, apart)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    return together


@every_many
def test_one_pass_is_as_many_passes_over_the_same_left_edge(block: str, positions: str) -> None:
    assert_one_pass_is_many(model(block, positions), all_query_positions())


@pytest.mark.parametrize("layers", [1, 4, 8])
def test_one_pass_is_as_many_passes_at_any_depth(layers: int) -> None:
    assert_one_pass_is_many(model("gated", "relative", layers=layers), all_query_positions())


@every_timed
def test_one_pass_is_as_many_passes_with_features_of_events(block: str, positions: str, times: str) -> None:
    assert_one_pass_is_many(model(block, positions, event=EVENT, times=times), all_query_positions())


@pytest.mark.parametrize("items", ["content", "both"])
@pytest.mark.parametrize(("block", "positions"), [("sasrec", "rotary"), ("gated", "relative")])
def test_one_pass_is_as_many_passes_with_contents_of_items(block: str, positions: str, items: str) -> None:
    made = model(block, positions, items=items, item_scale=True, event=EVENT)
    vectors = assert_one_pass_is_many(made, all_query_positions())
    by_id = query(ROWS)
    by_id["history"] = torch.where(ROWS > 0, 2, 0)
    unchanged = torch.equal(made(by_id, query_positions=all_query_positions()).U, vectors)
    assert unchanged == (items == "content"), "contents alone do not depend on ids"


@every_timed
def test_a_query_depends_on_the_features_of_earlier_events_alone(block: str, positions: str, times: str) -> None:
    made, query_positions = model(block, positions, event=EVENT, times=times), all_query_positions()
    before = made(query(ROWS), query_positions=query_positions).U
    values = [("history.action", 1), ("history.price", 20.0), ("history.when", START - 1_234_567_891_011)]
    for name, value in values[: 2 + (times != "none")]:
        for j in range(LENGTHS[0]):
            changed = query(ROWS)
            changed[name] = changed[name].clone()
            changed[name][0, j] = value
            after = made(changed, query_positions=query_positions).U
            blind = (query_positions.row != 0) | (query_positions.prefix_length <= j)
            assert torch.equal(after[blind], before[blind]), f"{name} {j} affects earlier queries"
            # one event alone is at no distance of another
            effect = ~blind & ((query_positions.prefix_length > 1) | (name != "history.when"))
            assert (after[effect] - before[effect]).abs().amax(dim=1).min() > 1e-5, f"{name} {j} has no effect"


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("request_time", [False, True])
def test_attention_depends_on_differences_of_times(many: bool, request_time: bool) -> None:
    """Times since 1970 as times since START, to the last second; in milliseconds or seconds they are the same."""
    request = ("action", "when") if request_time else ()
    made = model("gated", "relative", event=EVENT, times="rotary", request=request)
    query_positions = all_query_positions() if many else None
    number = len(query_positions.row) if query_positions is not None else len(ROWS)
    asked = torch.arange(number)

    def vectors(start: int, seconds: Tensor, after: int = 10**7) -> Tensor:
        times = {"history.when": start + seconds * 10**6, "request.when": start + (after + asked) * 10**6}
        return made({**query(ROWS), "request.action": asked % 4, **times}, query_positions=query_positions).U

    found = vectors(START, SINCE_START)
    torch.testing.assert_close(found, vectors(0, SINCE_START), rtol=1e-5, atol=1e-5)
    later = SINCE_START.clone()
    later[:, 1] += 30
    assert (found - vectors(START, later)).abs().max() > 1e-4, "30 seconds have no effect"
    moved = (found - vectors(START, SINCE_START, 10**7 + 30)).abs().amax(dim=1)
    has_events = query_positions.prefix_length > 0 if query_positions is not None else torch.tensor(LENGTHS) > 0
    assert (moved[has_events] > 1e-5).all() if request_time else (moved == 0).all()
    assert (moved[~has_events] == 0).all()


def test_unknown_times_are_no_differences() -> None:
    made = model("gated", "relative", event=EVENT, times="rotary", request=("action", "when"))
    request = {"request.action": torch.arange(4)}

    def vectors(times: Tensor, of_request: Tensor) -> Tensor:
        return made({**query(ROWS), **request, "history.when": times, "request.when": of_request}).U

    newest = TIMES[torch.arange(4), torch.tensor(LENGTHS) - 1]
    unknown = torch.full_like(newest, UNKNOWN_TIME)
    torch.testing.assert_close(vectors(TIMES, unknown), vectors(TIMES, newest))
    none, one = torch.full_like(TIMES, UNKNOWN_TIME), torch.full_like(TIMES, START)
    torch.testing.assert_close(vectors(none, newest), vectors(one, newest * 0 + START))


def requests() -> tuple[QueryPositions, dict[str, Tensor]]:
    """All query positions of all rows, every third one twice, and their requests."""
    row, seen = all_query_positions()[:2]
    row, seen = torch.cat([row, row[::3]]), torch.cat([seen, seen[::3]])
    m = len(row)
    prices = torch.arange(m) * 0.3  # all different; one is missing
    prices[1] = torch.nan
    when = START + 10**13 + torch.arange(m) * 10**10
    values = {"request.action": torch.arange(m) % 4, "request.price": prices, "request.when": when}
    return QueryPositions(row, seen), values


@every_timed
def test_one_pass_of_requests_is_as_many_passes(block: str, positions: str, times: str) -> None:
    made = model(block, positions, event=EVENT, request=tuple(EVENT), times=times)
    together = assert_one_pass_is_many(made, *requests())
    assert (torch.pdist(together) > 1e-5).all(), "two requests at one prefix differ"


@every_timed
def test_a_request_changes_its_own_query_alone(block: str, positions: str, times: str) -> None:
    made = model(block, positions, event=EVENT, request=tuple(EVENT), times=times)
    query_positions, values = requests()
    before = made({**query(ROWS), **values}, query_positions=query_positions).U
    for number in range(0, len(before), 5):
        changed = {**values, "request.price": values["request.price"].clone()}
        changed["request.price"][number] = 33.0
        changed["request.when"] = values["request.when"].clone()
        changed["request.when"][number] += 10**11
        after = made({**query(ROWS), **changed}, query_positions=query_positions).U
        assert (after != before).any(dim=1).nonzero().flatten().tolist() == [number]


@every_many
def test_a_query_does_not_depend_on_later_events(block: str, positions: str) -> None:
    made, query_positions = model(block, positions), all_query_positions()
    before = made(query(ROWS), query_positions=query_positions).U
    for j in range(LENGTHS[0]):
        changed = ROWS.clone()
        changed[0, j] = 11
        after = made(query(changed), query_positions=query_positions).U
        blind = (query_positions.row != 0) | (query_positions.prefix_length <= j)
        assert torch.equal(after[blind], before[blind]), f"item {j} affects earlier queries"
        assert (after[~blind] - before[~blind]).abs().amax(dim=1).min() > 1e-5, (
            f"item {j} does not affect later queries"
        )


@every
def test_padding_changes_nothing(block: str, positions: str) -> None:
    made = model(block, positions, event=EVENT)
    longer = torch.nn.functional.pad(ROWS, (0, 2))
    torch.testing.assert_close(made(query(longer)).U, made(query(ROWS)).U)
    if positions != "age":
        query_positions = all_query_positions()
        torch.testing.assert_close(
            made(query(longer), query_positions=query_positions).U, made(query(ROWS), query_positions=query_positions).U
        )


@pytest.mark.parametrize(("block", "positions"), [case for case in ALL if case[1] != "none"])
def test_positions_encode_the_order_of_items(block: str, positions: str) -> None:
    """With one layer, which without positions would only distinguish the newest item."""
    rows = torch.tensor([[2, 3, 4, 5], [3, 2, 4, 5], [2, 4, 3, 5]])
    attention_alone = {"filter_share": 0.0} if block == "lowpass" else {}  # the average depends on the order, too
    made = model(block, positions, layers=1, **attention_alone)
    vectors = made({"history": rows, "age": torch.full((3,), 30.0)}).U
    assert torch.pdist(vectors).min() > 1e-4


@every_many
def test_query_positions_come_in_any_order_and_may_skip_rows(block: str, positions: str) -> None:
    made, query_positions = model(block, positions), all_query_positions()
    vectors = made(query(ROWS), query_positions=query_positions).U
    order = torch.randperm(len(vectors))
    torch.testing.assert_close(
        made(
            query(ROWS),
            query_positions=QueryPositions(query_positions.row[order], query_positions.prefix_length[order]),
        ).U,
        vectors[order],
    )
    some = (query_positions.row == 1) | (query_positions.row == 3)  # no queries of rows 0 and 2
    torch.testing.assert_close(
        made(
            query(ROWS), query_positions=QueryPositions(query_positions.row[some], query_positions.prefix_length[some])
        ).U,
        vectors[some],
    )
    twice = QueryPositions(torch.tensor([1, 1]), torch.tensor([3, 3]))
    torch.testing.assert_close(*made(query(ROWS), query_positions=twice).U)
    nothing = made(query(ROWS), query_positions=QueryPositions(*torch.zeros(2, 0, dtype=torch.int64)))
    assert nothing.U.shape == (0, 6)
    found = gradients(made, nothing.U)  # zero, but not None: ZeRO requires a gradient of every parameter
    own = {name for name, _ in made.named_parameters() if name.startswith(("query_tower", "tables"))}
    assert own <= found.keys() and all(gradient.count_nonzero() == 0 for gradient in found.values())


def test_features_without_positions_are_encoded_once_per_row() -> None:
    made, query_positions = model("sasrec", "relative"), all_query_positions()
    encoder = made.query_tower.encoders["age"]
    calls: list[int] = []
    encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    younger, older = (
        made({"history": ROWS, "age": torch.tensor([30.0, 30.0, 30.0, age])}, query_positions=query_positions).U
        for age in (30.0, 50.0)
    )
    assert calls == [4, 4], "encoded for each query, not once for the row"
    differs = (younger != older).any(dim=1)
    assert torch.equal(differs, query_positions.row == 3)


@every_many
def test_gradients_are_those_of_finite_differences(block: str, positions: str) -> None:
    made = model(block, positions, layers=2, feedforward=1).double()
    encoder = made.query_tower.encoders["history"]
    names = [name for name, _ in encoder.named_parameters()]
    rows, query_positions = (
        torch.tensor([[2, 3, 4], [5, 0, 0]]),
        QueryPositions(torch.tensor([0, 1, 0, 0]), torch.tensor([3, 1, 0, 2])),
    )

    def vectors(*parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(encoder, given, (rows, query_positions))

    assert torch.autograd.gradcheck(vectors, tuple(encoder.parameters()), fast_mode=True)


def test_the_filter_is_an_exponential_moving_average() -> None:
    """From zero, at all positions and at the last one, in a layer without attention."""
    torch.manual_seed(0)
    layer, x = LowPassBlock(WIDTH, 2, 4, dropout=0.0, filter_share=1.0, filter_decay=0.8), torch.randn(3, 9, WIDTH)
    averages, average = [], torch.zeros(3, WIDTH)
    for vectors in x.unbind(1):
        average = 0.8 * average + 0.2 * vectors
        averages.append(average)
    with torch.no_grad():
        hidden = layer.filter_norm(x + torch.stack(averages, 1))
        expected = layer.output_norm(hidden + layer.feedforward(hidden))
        position = torch.arange(9)
        for first in (0, 8):
            mask = (position[first:, None] >= position)[None, None]
            context = AttentionContext(position[first:], position, mask, False, None, None)
            torch.testing.assert_close(layer(x[:, first:], x, context), expected[:, first:])


@pytest.mark.slow
@pytest.mark.parametrize(("block", "positions"), [("sasrec", "rotary"), ("gated", "relative"), ("lowpass", "relative")])
def test_eight_layers_train(block: str, positions: str) -> None:
    """The next item equals the second newest one, so that the task requires positions."""
    made = model(block, positions, layers=8)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(2, NUM_ITEMS, (24, MAX_ITEMS), generator=generator)
    row, seen = torch.arange(24).repeat_interleave(MAX_ITEMS - 1), torch.arange(2, MAX_ITEMS + 1).repeat(24)
    target = rows[row, seen - 2] - 2
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    features = {"history": rows, "age": torch.full((24,), 30.0)}
    losses = []
    for _ in range(120 if block == "lowpass" else 60):  # post-norm layers start more slowly
        encoded = made(features, {"item": torch.arange(2, NUM_ITEMS)}, query_positions=QueryPositions(row, seen))
        loss = torch.nn.functional.cross_entropy(encoded.U @ encoded.W.T, target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * min(losses[0], torch.tensor(NUM_ITEMS - 2.0).log().item()), losses[::10]


@every
def test_attention_multiplied_out_is_the_fused_one(block: str, positions: str) -> None:
    fused, plain = model(block, positions), model(block, positions)
    use_eager_attention(plain)
    for mode in (True, False):
        torch.testing.assert_close(plain.train(mode)(query(ROWS)).U, fused.train(mode)(query(ROWS)).U)
    plain.train()
    with torch.autocast("cpu", torch.bfloat16):
        half = plain(query(ROWS)).U
    exact = fused(query(ROWS)).U
    assert (half.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_plain_attention_is_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **given: Any) -> Tensor:
        calls.append(1)
        return kernel(*args, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    made = model("sasrec", "age")
    for plain, mode, expected in ((False, True, 2), (False, False, 2), (True, True, 0), (True, False, 2)):
        if plain:
            use_eager_attention(made)
        calls.clear()
        made.train(mode)(query(ROWS))
        assert len(calls) == expected, (plain, mode)


@every
def test_activations_that_are_computed_again_are_the_same(block: str, positions: str) -> None:
    """With dropout, whose masks must be replayed."""
    found = []
    for again in (False, True):
        made = model(block, positions, dropout=0.3)
        if again:
            made.checkpoint_activations()
        torch.manual_seed(3)
        vectors = made(query(ROWS), query_positions=None if positions == "age" else all_query_positions()).U
        found.append((vectors.detach(), gradients(made, vectors)))
    (vectors, grads), (vectors_again, grads_again) = found
    assert torch.equal(vectors, vectors_again)
    for name in grads:
        torch.testing.assert_close(grads[name], grads_again[name])


def test_items_are_scaled_by_the_root_of_their_width() -> None:
    plain, scaled = model("sasrec", "age"), model("sasrec", "age", item_scale=True)
    with torch.no_grad():
        plain.tables.tables["doc_item"].weight *= WIDTH**0.5  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(scaled(query(ROWS)).U, plain(query(ROWS)).U)


def config(history: HistoryEncoderConfig) -> Config:
    data = DataConfig(dir="d", query=dict(QUERY), doc=dict(DOC))
    return Config(run=RunConfig(dir="r"), data=data, model=ModelConfig(query=TowerConfig(history=history)))


@every
def test_blocks_and_positions_that_go_together(block: Any, positions: Any) -> None:
    check_config(config(HISTORY_BLOCKS.read("model.query.history", {"block": block, "positions": positions})))


@pytest.mark.parametrize("positions", ["age", "relative", "rotary", "none"])
def test_an_age_is_of_one_query(positions: Literal["age", "relative", "rotary", "none"]) -> None:
    made = config(Sasrec(positions=positions))
    check_many_queries("data.targets_per_row=4", replace(made.data, query={"age": QUERY["age"]}), made.model)
    if positions != "age":
        check_many_queries("data.targets_per_row=4", made.data, made.model)
        other = {**QUERY, "kinds": History(of="item", max_items=5).with_name("kinds")}
        with pytest.raises(ConfigError, match=r"max_items \{'history': 9, 'kinds': 5\}"):
            check_many_queries("data.targets_per_row=4", replace(made.data, query=other), made.model)
    else:
        sentence = r"model\.query\.history\.positions=age .* data\.targets_per_row=4 .*; use relative, rotary or none"
        with pytest.raises(ConfigError, match=sentence):
            check_many_queries("data.targets_per_row=4", made.data, made.model)


def test_rotary_turns_pairs() -> None:
    with pytest.raises(ConfigError, match="positions=rotary needs heads of an even width of at least 2, got 1"):
        model("sasrec", "rotary", heads=8)
    with pytest.raises(ConfigError, match="positions and times=rotary needs heads of an even width of at least 4"):
        model("sasrec", "rotary", heads=4, times="rotary")
