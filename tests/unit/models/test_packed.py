"""Packed texts and histories give the same vectors and gradients as padded ones.

Here attention within rows is a loop over them: the kernel that has it in one launch is CUDA's.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigdssm.loader import step_plan as plan_module
from bigdssm.loader.step_plan import StepPlan, group_by_length, plan_side
from bigdssm.models import (
    PackedLists,
    QueryPositions,
    RowGroup,
    SequenceBounds,
    compile_layers,
    pack,
    use_packing,
)
from bigdssm.models.packed import Attention
from tests.packing import by_mask, within_rows
from tests.unit.models.packed_models import (
    EVENT,
    LISTS,
    PAD,
    gradients,
    lengths,
    model,
    never_packed,
    sides,
    vectors,
)


def assert_packed_is_padded(
    side: str,
    chunk_tokens: int,
    query_positions: QueryPositions | None = None,
    by: Attention | None = within_rows,
    **given: Any,
) -> None:
    plain, packed = model(**given), model(**given)
    never_packed(plain)
    if by is not None:
        use_packing(packed, by)
    assert packed.accepts_packed(training=True) != plain.accepts_packed(training=True)
    if given.get("pooling") == "cls":  # the vector of an empty padded text is that of the padding token
        for made in (plain, packed):
            made.text["query"].register_forward_hook(lambda _, given, out: out * _some(given[0]))  # type: ignore[union-attr]
    expected, found = (
        vectors(plain, side, chunk_tokens, query_positions),
        vectors(packed, side, chunk_tokens, query_positions),
    )
    assert expected.std(dim=0).min() > 0.01, "the rows are hardly different"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(packed, found), gradients(plain, expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _some(texts: Any) -> Tensor:
    lengths_R = (texts != PAD).sum(dim=1) if isinstance(texts, Tensor) else texts.lengths
    return (lengths_R > 0).float().unsqueeze(1)


SIZES = pytest.mark.parametrize("chunk_tokens", [0, 25])


@SIZES
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("side", ["query", "doc"])
def test_packed_texts_are_padded_ones(side: str, pooling: str, chunk_tokens: int) -> None:
    assert_packed_is_padded(side, chunk_tokens, pooling=pooling)


@SIZES
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("positions", ["age", "none", "rotary"])
@pytest.mark.parametrize("block", ["sasrec", "gated"])
def test_packed_histories_are_padded_ones(block: str, positions: str, layers: int, chunk_tokens: int) -> None:
    assert_packed_is_padded("query", chunk_tokens, block=block, positions=positions, layers=layers, item_scale=True)


GROUPED = pytest.mark.parametrize(
    ("block", "positions"),
    [("gated", "relative"), ("sasrec", "relative"), ("gated", "rotary"), ("sasrec", "none"),
     ("lowpass", "relative"), ("lowpass", "rotary")],
)  # fmt: skip


@pytest.fixture
def many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 9 items per row, in as many groups as rows of hundreds."""
    monkeypatch.setattr(plan_module, "SIMILAR_CELLS", 0)


@pytest.mark.slow
@SIZES
@GROUPED
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("by", [None, within_rows])
def test_histories_that_no_kernel_attends_over_are_packed_in_groups(
    block: str, positions: str, layers: int, by: Attention | None, chunk_tokens: int, many_groups: None
) -> None:
    assert_packed_is_padded("query", chunk_tokens, by=by, block=block, positions=positions, layers=layers)


@SIZES
@GROUPED
def test_many_queries_of_histories_in_groups(block: str, positions: str, chunk_tokens: int, many_groups: None) -> None:
    row, seen = torch.tensor([[0, 0, 0, 2, 2, 3, 4, 5, 5], [9, 0, 4, 1, 4, 1, 0, 7, 3]])
    assert_packed_is_padded("query", chunk_tokens, QueryPositions(row, seen), None, block=block, positions=positions)


@SIZES
@pytest.mark.parametrize(
    ("block", "positions", "many", "by"),
    [
        ("gated", "relative", True, None), ("gated", "relative", False, None),
        ("sasrec", "rotary", True, within_rows), ("gated", "rotary", False, within_rows),
        ("lowpass", "relative", True, None), ("lowpass", "rotary", False, within_rows),
    ],
)  # fmt: skip
def test_requests_over_packed_histories(
    block: str, positions: str, many: bool, by: Attention | None, chunk_tokens: int, many_groups: None
) -> None:
    row, seen = torch.tensor([[0, 0, 0, 2, 2, 3, 4, 5, 5], [9, 0, 0, 4, 4, 1, 0, 7, 3]])
    queries = QueryPositions(row, seen) if many else None
    given = {"block": block, "positions": positions, "request": ("action", "price")}
    assert_packed_is_padded("query", chunk_tokens, queries, by, **given)


@pytest.mark.parametrize(
    ("block", "positions", "by"),
    [("gated", "relative", None), ("lowpass", "relative", None), ("sasrec", "rotary", within_rows)],
)
def test_requests_over_chunks_of_empty_histories(block: str, positions: str, by: Attention | None) -> None:
    given = sides()
    for name in ("history", "history.action", "history.price", "history.when"):
        given["query"][name][1:] = 0
    row, seen = torch.tensor([[0, 1, 1, 2, 3, 4, 5, 0], [9, 0, 0, 0, 0, 0, 0, 0]])
    with mock.patch(f"{__name__}.sides", lambda: given):
        plan = plan_side(lengths("query"), 6, 9, np.bincount(row), frozenset({"history"}))
        empty = [chunk.runs["history"].last == chunk.runs["history"].first for chunk in plan.chunks]
        assert 1 < sum(empty) < len(empty)
        options = {"block": block, "positions": positions, "request": tuple(EVENT), "times": "rotary"}
        assert_packed_is_padded("query", 9, QueryPositions(row, seen), by, **options)


@SIZES
@pytest.mark.parametrize(
    ("positions", "many", "request_times", "by"),
    [("relative", True, True, None), ("relative", False, False, None), ("relative", True, False, None),
     ("rotary", False, True, within_rows), ("none", True, False, within_rows),
     ("rotary", False, False, within_rows)],
)  # fmt: skip
def test_times_of_packed_histories(
    positions: str, many: bool, request_times: bool, by: Attention | None, chunk_tokens: int, many_groups: None
) -> None:
    row, seen = torch.tensor([[0, 0, 0, 2, 2, 3, 4, 5, 5], [9, 0, 0, 4, 4, 1, 0, 7, 3]])
    queries = QueryPositions(row, seen) if many else None
    given = {"block": "gated", "positions": positions, "request": ("when",) if request_times else ()}
    with_times, without = (vectors(model(times=t, **given), "query", 0, queries) for t in ("rotary", "none"))
    assert (with_times - without).abs().max() > 1e-3
    assert_packed_is_padded("query", chunk_tokens, queries, by, times="rotary", **given)


def test_modules_are_called_as_often_packed_as_padded(many_groups: None) -> None:
    """Under ZeRO-3 every call of a module gathers its weights on all ranks: the calls must not depend on groups."""

    def calls(packed: bool) -> list[int]:
        made, found = model(positions="relative", block="gated"), Counter[nn.Module]()
        if not packed:
            never_packed(made)
        encoder = made.query_tower.encoders["history"]
        for part in encoder.modules():
            part.register_forward_hook(lambda part, given, out: found.update([part]))
        vectors(made, "query", 0)
        return [found[part] for part in encoder.modules()]

    assert calls(packed=True) == calls(packed=False)


def test_rows_are_sorted_once_for_all_layers(many_groups: None) -> None:
    made, argsort = model(positions="relative", block="gated"), mock.Mock(side_effect=torch.Tensor.argsort)
    with mock.patch.object(torch.Tensor, "argsort", lambda *given, **further: argsort(*given, **further)):
        vectors(made, "query", 0)
    assert argsort.call_count == 1  # the dummy is not packed


def test_rows_of_like_length_are_a_group() -> None:
    lengths_R = np.random.default_rng(0).integers(0, 201, 500)
    groups = group_by_length(lengths_R)
    assert sum(group.rows for group in groups) == 500 and groups[0].longest == lengths_R.max()
    assert len(groups) <= 11 and all(a.longest > b.longest for a, b in pairwise(groups))
    padded = sum(group.rows * group.longest for group in groups)
    assert lengths_R.sum() <= padded <= 1.2 * lengths_R.sum()
    assert group_by_length(np.array([7, 0, 3])) == ((3, 7),)
    assert group_by_length(np.array([31, 0, 40, 30, 29])) == ((3, 40), (1, 29), (1, 0))


@SIZES
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("block", ["sasrec", "gated"])
def test_many_queries_of_packed_histories(block: str, positions: str, chunk_tokens: int) -> None:
    row, seen = torch.tensor([[0, 0, 0, 2, 2, 3, 4, 5, 5], [9, 0, 4, 1, 4, 1, 0, 7, 3]])
    assert_packed_is_padded("query", chunk_tokens, QueryPositions(row, seen), block=block, positions=positions)


def test_packed_lists_contain_the_filled_cells() -> None:
    rows = torch.tensor([[4, 0, 5, 0], [0, 0, 0, 0], [0, 7, 8, 9]])
    packed = pack(rows, 0, 5, 3)
    assert packed.values.tolist() == [4, 5, 7, 8, 9]
    assert packed.row.tolist() == [0, 0, 2, 2, 2] and packed.position.tolist() == [0, 2, 1, 2, 3]
    assert packed.bounds.offsets.tolist() == [0, 2, 2, 5] and packed.bounds.offsets.dtype == torch.int32
    part = packed.slice_rows(slice(1, 3), slice(2, 5), (RowGroup(1, 3), RowGroup(1, 0)))
    assert part.bounds.longest == 3 and packed.longest_first.tolist() == [2, 0, 1]
    assert part.values.tolist() == [7, 8, 9] and part.row.tolist() == [1, 1, 1]
    assert part.bounds.offsets.tolist() == [0, 0, 3] and part.lengths.tolist() == [0, 3]
    assert pack(rows[:0], 0, 0, 0).num_rows == 0


def test_a_plan_counts_encoded_tokens() -> None:
    """Packed lists have no padding, neither in the budget nor in a step's report."""
    given, every = lengths("query"), frozenset(LISTS["query"])
    whole = plan_side(given, 6, 0, packed=every)
    plan = plan_side(given, 6, 25, packed=every)
    tokens = sum(int(list_.filled.sum()) for list_ in given.values())
    assert whole.cells == plan.cells == plan.filled == tokens == 62
    assert StepPlan(plan, plan_side({}, 2, 25), whole=False).padding == 0
    # an empty text counts as one token, since its chunk computes its vector
    assert all(chunk.tokens <= 25 or chunk.num_rows == 1 for chunk in plan.chunks)
    assert len(plan.chunks) < len(plan_side(given, 6, 25).chunks)
    some = plan_side(given, 6, 25, packed=frozenset({"words"}))
    assert plan.cells < some.cells < plan_side(given, 6, 25).cells
    assert np.array_equal(np.sort(some.order), np.arange(6))


def test_lists_that_can_be_packed() -> None:
    texts, histories = {"words", "more"}, {"history"}

    def packs(training: bool = True, **given: Any) -> set[str]:
        made = model(**given)
        assert made.accepts_packed(training) == PackedLists(frozenset(histories)), "texts are packed by a kernel alone"
        use_packing(made, within_rows)
        return set(made.accepts_packed(training).query)

    assert packs() == packs(dropout=0.3) == packs(training=False, text_dropout=0.3) == texts | histories
    assert packs(text_dropout=0.3) == histories, "attention has dropout"
    assert packs(positions="relative") == packs(block="lowpass", positions="relative") == texts | histories
    assert packs(heads=4) == texts | histories, "though the kernel does not take heads of their width"


@pytest.mark.parametrize("again", [False, True])
def test_the_kernel_is_given_half_precision_under_autocast(again: bool) -> None:
    """Recomputed activations must also attend within texts."""
    made, calls = model(positions="rotary", block="gated").train(), []

    def spied(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_bounds: SequenceBounds,
        key_bounds: SequenceBounds,
        scale: float,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        calls.append(q.shape)
        assert {part.dtype for part in (q, k, v)} == {torch.bfloat16}
        assert all(part.stride(2) == 1 and part.shape[2] % 8 == 0 for part in (q, k, v))
        assert {bounds.offsets.dtype for bounds in (query_bounds, key_bounds)} == {torch.int32}
        return within_rows(q, k, v, query_bounds, key_bounds, scale, causal)

    use_packing(made, spied)
    if again:
        made.checkpoint_activations()
    with torch.autocast("cpu", torch.bfloat16):
        found = vectors(made, "query", 0)
    forward = len(calls)
    found.float().sum().backward()
    assert len(calls) == forward * (2 if again else 1)
    exact = vectors(model(positions="rotary", block="gated"), "query", 0)
    assert (found.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "history"),
    [(by_mask, {"layers": 1}), (None, {"layers": 1}), (None, {"positions": "relative", "block": "gated"}),
     (None, {"positions": "rotary", "times": "rotary"})],
)  # fmt: skip
def test_compiled_layers_give_the_same_for_all_lengths_from_a_few_graphs(
    by: Attention | None, history: dict[str, Any]
) -> None:
    """Packed, and padded in dummies and without a kernel; the backend is not tested."""
    plain, made = model(**history), model(**history)
    never_packed(plain)
    if by is not None:
        use_packing(made, by)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(made, backend="eager")
    assert made.state_dict().keys() == plain.state_dict().keys()
    for chunk_tokens in (0, 21, 25, 40, 33):
        expected, found = vectors(plain, "query", chunk_tokens), vectors(made, "query", chunk_tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        ours, theirs = gradients(made, found), gradients(plain, expected)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    # independent of the shapes of chunks; sizes of 1 have separate graphs
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12
    assert not torch._dynamo.utils.counters["graph_break"]
