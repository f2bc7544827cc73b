"""Events of a generated shop whose next item has a known distribution, and the best possible ranking of them.

    python -m tools.evidence.generated_shop --out FOLDER [--seed 0] [--users 3000] [--days 90] [--new-items-per-day 0]
                                            [--styles 5]

Writes `events.parquet` (user_id, item_id, timestamp, event_type, device), `items.parquet` (item_id, category) and
`ranks.parquet` (of every event the rank of its item by the oracle and by a Markov chain by action that is rebuilt every
night), and prints NDCG@10 of both over the events of the last tenth of the days.

With new items, each has a category and a style, which decide its sales from its day on; `items.parquet` has both, and
`available_from`, seconds since 1970. The figures are also printed for items of the last fifth of the days.

A user makes visits. The next item depends on the last item, on its action and on whether the gap to the event is short
(same visit) or long; on the wanted action; on the device; and on the user's current category, which drifts between
visits. All parameters are functions of the seed. The oracle knows the parameters and, like a model, the events before
a target and the target's time, device and action, but no user's category: it filters them (Rabiner 1989, eq. 19 to 21).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ACTIONS = ("view", "cart", "purchase")
DEVICES = ("phone", "desktop")
VIEW, CART, PURCHASE = range(3)
CATEGORIES, STYLES, NUM_ITEMS = 20, 5, 2000  # styles per category, and items of the first day
NEW_ITEM_WEIGHT = 0.4  # of a new item within its style; the first ones have 1, 1/2, 1/3, …
# Shares of events whose item follows the last item, is of the user's category, or is of the device.
FOLLOWS, TASTE, OF_DEVICE = 0.78, 0.17, 0.05
SAME_STYLE = 0.85  # of the events that follow the last item
DRIFT = 0.3  # probability of a new category at a visit
NEW_VISIT = 0.25  # probability that the next event starts a visit
DAY = 86_400
START = 1_700_000_000  # of the first day, seconds since 1970
NEXT_ACTION = np.array([[0.7, 0.22, 0.08], [0.45, 0.2, 0.35], [0.8, 0.15, 0.05]])  # by the last action
RANKED = 10  # NDCG@10


@dataclass(frozen=True)
class Shop:
    """The parameters: the items, which category follows, and the popularity within styles and on devices."""

    styles: int  # per category
    style: np.ndarray  # int64 [items]: category · styles + style
    first_day: np.ndarray  # int64 [items]
    within: np.ndarray  # float64 [days, items]: of the items of a style
    next_category: np.ndarray  # int64 [last action, long gap, wanted purchase, category]
    on_device: np.ndarray  # float64 [device, items]

    @classmethod
    def of(cls, seed: int, days: int = 1, new_items_per_day: int = 0, styles: int = STYLES) -> Shop:
        """Draw the parameters."""
        random = np.random.default_rng([seed, 0])
        contexts, num_styles = len(ACTIONS) * 2 * 2, CATEGORIES * styles
        items_per_style = NUM_ITEMS // num_styles
        next_category = np.stack([random.permutation(CATEGORIES) for _ in range(contexts)])
        on_device = random.gamma(0.05, size=(len(DEVICES), NUM_ITEMS)) + 1e-9
        on_device /= on_device.sum(axis=1, keepdims=True)
        num_new = new_items_per_day * (days - 1)
        new_styles = np.random.default_rng([seed, 2]).integers(0, num_styles, num_new)
        style = np.r_[np.arange(NUM_ITEMS) // items_per_style, new_styles]
        first_day = np.r_[np.zeros(NUM_ITEMS, np.int64), 1 + np.arange(num_new) // max(1, new_items_per_day)]
        weight = 1 / np.arange(1, items_per_style + 1)
        new_per_style = np.zeros((days, num_styles))
        np.add.at(new_per_style, (first_day[NUM_ITEMS:], new_styles), NEW_ITEM_WEIGHT)
        total = weight.sum() + new_per_style.cumsum(axis=0)
        weights = np.r_[np.tile(weight, num_styles), np.full(num_new, NEW_ITEM_WEIGHT)]
        within = np.where(first_day <= np.arange(days)[:, None], weights / total[:, style], 0.0)
        return cls(
            styles, style, first_day, within, next_category.reshape(len(ACTIONS), 2, 2, CATEGORIES),
            np.pad(on_device, ((0, 0), (0, num_new))),
        )  # fmt: skip

    @property
    def category(self) -> np.ndarray:
        """The category of each item, int64 [items]."""
        return self.style // self.styles

    def following(self, last_item: np.ndarray, context: tuple[np.ndarray, ...], day: np.ndarray) -> np.ndarray:
        """Return the distribution of the items that follow the last one, [n, items]; context arrays and day are [n]."""
        category, style = np.divmod(self.style[last_item], self.styles)
        last_action, long_gap, purchase = context
        target = self.next_category[last_action, long_gap, purchase, category]
        styles = np.zeros((len(last_item), CATEGORIES, self.styles))
        styles[np.arange(len(last_item)), target] = (1 - SAME_STYLE) / (self.styles - 1)
        styles[np.arange(len(last_item)), target, style] = SAME_STYLE
        return styles.reshape(-1, CATEGORIES * self.styles)[:, self.style] * self.within[day]

    def of_category(self) -> np.ndarray:
        """Return the share of each item in the events of its category, [days, items]."""
        return self.within / self.styles


@dataclass(frozen=True)
class Events:
    """The events of all users, user after user in order of time; arrays are [events]."""

    user: np.ndarray  # int64
    item: np.ndarray  # int64
    time: np.ndarray  # int64: seconds since 1970
    action: np.ndarray  # int64
    device: np.ndarray  # int64
    long_gap: np.ndarray  # bool: the event starts a visit
    rank: np.ndarray  # int64: of the item, by the oracle; 0 is the best
    expected_ndcg: np.ndarray  # float64: NDCG@10 that the oracle expects for the event

    def take(self, events: np.ndarray) -> Events:
        """Select events by number."""
        return Events(*(getattr(self, name)[events] for name in self.__dataclass_fields__))


def generate(seed: int, users: int, days: int, new_items_per_day: int = 0, styles: int = STYLES) -> Events:
    """Draw the events, one of each user at a time, and rank their items by the oracle."""
    shop, random = Shop.of(seed, days, new_items_per_day, styles), np.random.default_rng([seed, 1])
    of_category, num_items = shop.of_category(), len(shop.style)
    time = START + random.integers(0, 20 * DAY, users)
    category, device = random.integers(0, CATEGORIES, users), random.integers(0, len(DEVICES), users)
    item, action = random.integers(0, NUM_ITEMS, users), np.full(users, VIEW)
    belief = np.full((users, CATEGORIES), 1 / CATEGORIES)  # of the oracle, before the next event
    parts: list[tuple[np.ndarray, ...]] = []
    first = True
    active = np.arange(users)
    while len(active):
        n = len(active)
        long_gap = random.random(n) < NEW_VISIT
        gap = np.where(long_gap, DAY * random.lognormal(0.5, 1.0, n) + 3600, random.lognormal(4.5, 1.0, n) + 1)
        time[active] += gap.astype(np.int64)
        active, long_gap = active[time[active] < START + days * DAY], long_gap[time[active] < START + days * DAY]
        n, day = len(active), (time[active] - START) // DAY
        # A visit may have another category and another device.
        changed = long_gap & (random.random(n) < DRIFT)
        category[active] = np.where(changed, random.integers(0, CATEGORIES, n), category[active])
        drifted = (1 - DRIFT) * belief[active] + DRIFT / CATEGORIES
        prior = np.where(long_gap[:, None], drifted, belief[active])
        device[active] = np.where(long_gap, random.integers(0, len(DEVICES), n), device[active])
        wanted = (random.random(n)[:, None] > NEXT_ACTION[action[active]].cumsum(axis=1)).sum(axis=1)
        # The item: one of three sources.
        context = (action[active], long_gap.astype(np.int64), (wanted == PURCHASE).astype(np.int64))
        follows = shop.following(item[active], context, day) if not first else np.zeros((n, num_items))
        share = (0.0, FOLLOWS + TASTE, OF_DEVICE) if first else (FOLLOWS, TASTE, OF_DEVICE)
        without_taste = share[0] * follows + share[2] * shop.on_device[device[active]]
        in_category = category[active, None] == shop.category
        truth = without_taste + share[1] * np.where(in_category, of_category[day], 0.0)
        drawn = (random.random((n, 1)) * truth.sum(axis=1, keepdims=True) > truth.cumsum(axis=1)).sum(axis=1)
        drawn = np.minimum(drawn, num_items - 1)
        # The oracle: the same distribution, with its belief in place of the category; then the belief is updated.
        predicted = without_taste + share[1] * prior[:, shop.category] * of_category[day]
        value = predicted[np.arange(n), drawn]
        rank = (predicted > value[:, None]).sum(axis=1)
        if new_items_per_day:  # those of a style are tied, and count half
            rank += (predicted == value[:, None]).sum(axis=1) // 2
        best = -np.sort(np.partition(-predicted, RANKED, axis=1)[:, :RANKED], axis=1)
        expected = best @ (1 / np.log2(np.arange(RANKED) + 2.0))
        of_drawn = np.zeros((n, CATEGORIES))
        of_drawn[np.arange(n), shop.category[drawn]] = of_category[day, drawn]
        likelihood = without_taste[np.arange(n), drawn][:, None] + share[1] * of_drawn
        posterior = prior * likelihood
        belief[active] = posterior / posterior.sum(axis=1, keepdims=True)
        item[active], action[active] = drawn, wanted
        columns = (active.copy(), drawn, time[active], wanted, device[active], long_gap, rank, expected)
        parts.append(columns)
        first = False
    events = Events(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return events.take(np.lexsort([events.time, events.user]))


def chain_ranks(events: Events, num_items: int = NUM_ITEMS) -> np.ndarray:
    """Return the rank of every item by a Markov chain by action, counted on the events of all earlier days.

    It has counts for an item from the day after its first event.
    """
    previous = np.r_[-1, np.arange(len(events.user) - 1)]
    has_previous = np.r_[False, events.user[1:] == events.user[:-1]]
    state = np.where(has_previous, events.action[previous] * num_items + events.item[previous], -1)
    counts = np.zeros((len(ACTIONS) * num_items, num_items), np.float32)
    popularity = np.zeros(num_items, np.float32)
    ranks = np.full(len(events.user), NUM_ITEMS, np.int64)
    day = (events.time - START) // DAY
    by_day = np.argsort(day, kind="stable")
    for today in np.split(by_day, np.flatnonzero(np.diff(day[by_day])) + 1):
        known = today[state[today] >= 0]
        # Popularity decides between equal counts.
        scores = counts[state[known]] + popularity / (popularity.sum() + 1)
        ranks[known] = (scores > scores[np.arange(len(known)), events.item[known]][:, None]).sum(axis=1)
        np.add.at(counts, (state[known], events.item[known]), 1)
        np.add.at(popularity, events.item[today], 1)
    return ranks


def ndcg(ranks: np.ndarray) -> float:
    """Return NDCG@10 of the ranks of one relevant item per query."""
    return float(np.where(ranks < RANKED, 1 / np.log2(ranks + 2.0), 0.0).mean())


def main() -> None:
    """Generate a shop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--new-items-per-day", type=int, default=0)
    parser.add_argument("--styles", type=int, default=STYLES, help="per category; a divisor of 100")
    args = parser.parse_args()
    shop = Shop.of(args.seed, args.days, args.new_items_per_day, args.styles)
    events = generate(args.seed, args.users, args.days, args.new_items_per_day, args.styles)
    chain = chain_ranks(events, len(shop.style))
    args.out.mkdir(parents=True, exist_ok=True)
    users, item_ids = ([f"{kind}{number}" for number in ids] for kind, ids in (("u", events.user), ("i", events.item)))
    keys = {"user_id": users, "item_id": item_ids, "timestamp": events.time}
    table = keys | {"event_type": np.array(ACTIONS)[events.action], "device": np.array(DEVICES)[events.device]}
    pq.write_table(pa.table(table), args.out / "events.parquet")
    pq.write_table(pa.table(keys | {"oracle": events.rank, "markov_by_action": chain}), args.out / "ranks.parquet")
    items: dict[str, object] = {"item_id": [f"i{item}" for item in range(len(shop.style))]}
    items["category"] = [f"c{number}" for number in shop.category]
    if args.new_items_per_day:
        items["style"] = [f"s{number}" for number in shop.style]
        items["available_from"] = START + shop.first_day * DAY
    pq.write_table(pa.table(items), args.out / "items.parquet")
    test = events.time >= START + int(0.9 * args.days) * DAY
    print(f"{len(events.user):,} events of {args.users:,} users, {int(test.sum()):,} in the last tenth of the days")
    groups = {a: events.action == k for k, a in enumerate(ACTIONS)}
    if args.new_items_per_day:
        groups["new items"] = shop.first_day[events.item] >= int(0.8 * args.days)
        print(f"{groups['new items'][test].mean():.1%} of them are of items of the last fifth of the days")
    for name, ranks in (("oracle", events.rank), ("Markov chain by action, rebuilt every night", chain)):
        by_group = ", ".join(f"{group} {ndcg(ranks[test & chosen]):.4f}" for group, chosen in groups.items())
        print(f"{name}: NDCG@10 {ndcg(ranks[test]):.4f} ({by_group})")


if __name__ == "__main__":
    main()
