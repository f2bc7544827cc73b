"""The generated shop: its oracle is calibrated, is ahead of a Markov chain by action, and needs no later event."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tools.evidence.generated_shop import (
    CATEGORIES,
    DAY,
    DRIFT,
    FOLLOWS,
    NUM_ITEMS,
    OF_DEVICE,
    PURCHASE,
    START,
    TASTE,
    Events,
    Shop,
    chain_ranks,
    generate,
    ndcg,
)


@pytest.fixture(scope="module")
def events() -> Events:
    return generate(seed=3, users=250, days=60)


def test_distributions_sum_to_one() -> None:
    shop, n = Shop.of(0), 50
    items = np.arange(n) * 37
    context = (np.arange(n) % 3, np.arange(n) % 2, np.arange(n) // 3 % 2)
    np.testing.assert_allclose(shop.following(items, context, np.zeros(n, int)).sum(axis=1), 1)
    new = Shop.of(0, days=9, new_items_per_day=30)
    following = new.following(items, context, np.arange(n) % 9)
    np.testing.assert_allclose(following.sum(axis=1), 1)
    has_new, is_first_day = following[:, NUM_ITEMS:].any(axis=1), np.arange(n) % 9 == 0
    assert not has_new[is_first_day].any() and has_new[~is_first_day].mean() > 0.8
    for each in (shop, new):
        of_category = each.of_category()
        assert of_category.shape == (len(each.within), len(each.style))
        by_category = [of_category[:, each.category == number].sum(axis=1) for number in range(CATEGORIES)]
        np.testing.assert_allclose(by_category, 1)


@pytest.mark.parametrize("new_items_per_day", [0, 40])
def test_the_oracle_averages_over_all_categories_that_its_users_may_have(new_items_per_day: int) -> None:
    shop, compared = Shop.of(3, 60, new_items_per_day), 0
    events, num_items = generate(3, 20, 60, new_items_per_day), len(shop.style)
    assert (shop.first_day[events.item] <= (events.time - START) // DAY).all()
    assert (events.item >= NUM_ITEMS).mean() == pytest.approx(0.5 if new_items_per_day else 0, abs=0.15)
    for user in range(10):
        mine = events.take(np.flatnonzero(events.user == user))
        visit = np.r_[0, np.cumsum(mine.long_gap[1:])]
        last = int((visit < 2).sum())  # two visits: all pairs of categories
        weight = dict.fromkeys(itertools.product(range(CATEGORIES), repeat=2), 1 / CATEGORIES**2)
        for pair in weight:
            weight[pair] *= DRIFT + (1 - DRIFT) * CATEGORIES * (pair[0] == pair[1])
        for k in range(last):
            context = (mine.action[[k - 1]], mine.long_gap[[k]].astype(int), (mine.action[[k]] == PURCHASE).astype(int))
            day = (mine.time[[k]] - START) // DAY
            follows = FOLLOWS * shop.following(mine.item[[k - 1]], context, day)[0] if k else np.zeros(num_items)
            of_category = shop.of_category()[day[0]]
            given = {
                pair: follows + (TASTE if k else FOLLOWS + TASTE) * of_category * (shop.category == pair[visit[k]])
                + OF_DEVICE * shop.on_device[mine.device[k]]
                for pair in weight
            }  # fmt: skip
            predicted = sum(weight[pair] * given[pair] for pair in weight) / sum(weight.values())
            best = np.sort(predicted)[::-1][:10]
            assert mine.expected_ndcg[k] == pytest.approx((best / np.log2(np.arange(10) + 2.0)).sum(), rel=1e-9)
            weight = {pair: weight[pair] * given[pair][mine.item[k]] for pair in weight}
            compared += visit[k]
    assert compared > 10  # events after a drift


def test_the_oracle_is_ahead_of_the_chain_and_events_are_in_order(events: Events) -> None:
    newest = events.time >= START + 54 * DAY
    assert ndcg(events.rank[newest]) > 1.5 * ndcg(chain_ranks(events)[newest])
    same = events.user[1:] == events.user[:-1]
    assert (np.diff(events.time)[same] > 0).all() and (np.diff(events.user) >= 0).all()
    assert set(events.action) == {0, 1, 2} and set(events.device) == {0, 1}


def test_a_seed_gives_the_same_events() -> None:
    first, again, other = (generate(seed, users=20, days=30) for seed in (3, 3, 4))
    np.testing.assert_array_equal(again.item, first.item)
    assert len(other.item) != len(first.item) or (other.item != first.item).any()
