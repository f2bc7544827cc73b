"""The parts of the masks: lookup of ids, and equality of the sparse and the dense mask."""

from __future__ import annotations

import pytest
import torch

from bigdssm.losses import masks
from bigdssm.losses.ids import FactorizedIds
from bigdssm.losses.kernels.torch_passes import BlockMask
from bigdssm.losses.masks import (
    KnownPositives,
    MaskMatrix,
    MaskPairs,
    MaskTimes,
    find_false_negatives,
    find_known_positives,
    local_pairs,
    mask_bytes,
)

GENERATOR = torch.Generator().manual_seed(0)
WIDE = torch.randint(-(2**63), 2**63 - 1, (4000,), generator=GENERATOR)


@pytest.mark.parametrize(
    "ids", [WIDE, torch.arange(-2000, 2000), torch.arange(4000) << 40, torch.tensor([2**63 - 1]), WIDE[:0]]
)
def test_ids_are_looked_up_at_their_rows(ids: torch.Tensor) -> None:
    """For ids that differ in any bits."""
    ids = torch.sort(torch.unique(ids))[0]
    wanted = torch.cat([ids, ids + 1, ids - 1, ids + (1 << 32), WIDE[:100] ^ 5, ids.flip(0)])
    there, at = FactorizedIds(ids).find(wanted)
    assert torch.equal(there, torch.isin(wanted, ids))
    assert torch.equal(ids[at[there]], wanted[there])


@pytest.mark.parametrize("chunk", [1 << 16, 7])
@pytest.mark.parametrize("own", [True, False])
def test_a_byte_matrix_equals_a_mask_of_pairs(monkeypatch: pytest.MonkeyPatch, own: bool, chunk: int) -> None:
    """With documents in several columns, unused columns, duplicate pairs and several queries of one id."""
    monkeypatch.setattr(masks, "_CHUNK_PAIRS", chunk)
    m, N = 30, 50
    docs = torch.randint(20, (N,), generator=GENERATOR) << 30
    valid = torch.arange(N)[torch.rand(N, generator=GENERATOR) < 0.8]
    names = torch.arange(m) if own else torch.randint(9, (m,), generator=GENERATOR)
    positive = valid[torch.randint(len(valid), (m,), generator=GENERATOR)]
    weight = (torch.rand(m, generator=GENERATOR) < 0.7).double()
    known = torch.stack([
        names[torch.randint(m, (200,), generator=GENERATOR)], torch.randint(30, (200,), generator=GENERATOR) << 30,
    ], 1)  # fmt: skip
    told = None if own else local_pairs(names, docs[positive], weight, known)[None]
    counts = torch.tensor([int((weight > 0).sum()) + len(known)])
    found = find_known_positives(None if own else names, docs[positive], weight, known, told, counts)
    pairs = {*zip(names[weight > 0].tolist(), docs[positive][weight > 0].tolist(), strict=True)}
    pairs |= {tuple(pair) for pair in known.tolist()}
    right = torch.tensor([[(q, d) in pairs for d in docs.tolist()] for q in names.tolist()])
    right[:, ~torch.isin(torch.arange(N), valid)] = False
    values = torch.zeros(N, dtype=torch.float64)
    values[valid] = torch.rand(len(valid), generator=GENERATOR, dtype=torch.float64)
    for cells, kind in ((1 << 16, MaskPairs), (0, MaskMatrix)):
        monkeypatch.setattr(masks, "_MATRIX_CELLS", cells)
        mask = find_false_negatives(found, FactorizedIds(docs[valid]), valid, N)
        assert isinstance(mask, kind)
        torch.testing.assert_close(mask.row_sums(values), (right * values).sum(1))
        rows = torch.arange(0, m, 2)
        assert torch.equal(mask.contains(rows, positive[rows]), right[rows, positive[rows]])
        if isinstance(mask, MaskMatrix):
            assert torch.equal(mask.rows(3, 17) > 0, right[3:17])
        else:
            entries = torch.zeros(14, N, dtype=torch.bool)
            entries[mask.entries(3, 17, int(right[3:17].sum()))] = True
            assert torch.equal(entries, right[3:17])
            assert torch.equal(mask.rows(3, 17)[:, valid] > 0, right[3:17, valid])
            assert mask.block_lengths(7) == [int(some.sum()) for some in right.split(7)]


@pytest.mark.parametrize(("cells", "kind"), [(1 << 16, MaskPairs), (0, MaskMatrix)])
def test_a_mask_of_times_adds_the_columns_that_are_later_than_a_row(
    monkeypatch: pytest.MonkeyPatch, cells: int, kind: type
) -> None:
    monkeypatch.setattr(masks, "_MATRIX_CELLS", cells)
    m, N = 300, 40
    rows, known = torch.arange(m), torch.randint(N, (m,), generator=GENERATOR)
    found = KnownPositives(rows, m, True, [(rows, known, torch.rand(m, generator=GENERATOR) < 0.5)])
    false_negatives = find_false_negatives(found, FactorizedIds(torch.arange(N)), torch.arange(N), N)
    assert isinstance(false_negatives, kind)
    time, since = (torch.rand(number, generator=GENERATOR, dtype=torch.float64) for number in (m, N))
    time[::7], since[3] = torch.nan, torch.inf
    is_known, is_later = false_negatives.rows(0, m) > 0, since > time[:, None]
    mask, right = MaskTimes(false_negatives, time, since), is_known | is_later
    assert (is_known & is_later).any() and is_later[1].any() and not is_later[7, 3]
    assert torch.equal(mask.rows(10, 290) > 0, right[10:290])
    values = torch.rand(N, generator=GENERATOR, dtype=torch.float64)
    torch.testing.assert_close(mask.row_sums(values), (right * values).sum(1))
    assert torch.equal(mask.contains(rows, known), right[rows, known])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_scores_are_minus_infinity_and_others_unchanged(dtype: torch.dtype) -> None:
    S = torch.randn(7, 40, generator=GENERATOR, dtype=dtype) * torch.tensor([1e-30, 1.0, 100.0, 1e30] * 10).to(dtype)
    dense = (torch.rand(7, 60, generator=GENERATOR) < 0.3).byte()
    right = S.masked_fill(dense[:, 15:55] > 0, -torch.inf)
    BlockMask(dense=dense).drop(S, slice(15, 55))
    assert torch.equal(S, right)


def test_a_mask_takes_no_more_as_a_matrix_than_as_pairs() -> None:
    m, N = 6400, 3400
    assert mask_bytes(m, N, 200 * m) == m * N
    assert mask_bytes(m, N, m) < m * N / 40
    assert mask_bytes(m, N, m * N // 48) <= 1.1 * mask_bytes(m, N, m * N // 49)
