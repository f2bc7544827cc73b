"""A generated shop with a funnel: visits of views, carts and purchases, new and withdrawn products, and an oracle.

    python -m tools.evidence.funnel_shop --out FOLDER [--seed 0] [--users 3000] [--days 90]

Writes `events.parquet` (user_id, item_id, timestamp, event_type, device), `items.parquet` (item_id, category, brand,
price, available_from, arrived: one row per version), `withdrawn.csv` (item_id) and `oracle.parquet` (user_id, item_id,
timestamp and the rank of the product by the oracle, of the first event of each product in a visit), and prints the
metrics of the oracle on purchases of the last three days.

Each user has a budget, favourite brands, and current categories, which drift. A visit has a device and one to eight
products. The next product is, by the shares of SOURCES, similar to the last one (a list of the last product's own), an
accessory of it (after a purchase; another list), of the user's taste, one of the new products, or a popular one. A
product is viewed, then perhaps put into the cart, then perhaps purchased, at once or at the end of the visit: the more
likely, the better its price and its brand fit the user; offers raise both.

Every day NEW_PER_DAY products arrive, which are popular for NEW_DAYS days and enter the lists of similar products, and
WITHDRAWN_PER_DAY products leave. The oracle has the parameters and the state of the user, and the last events.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.evidence.generated_shop import RANKED, ndcg

ACTIONS = ("view", "cart", "purchase")
VIEW, CART, PURCHASE = range(3)
DEVICES = ("phone", "desktop")
CATEGORIES, BRANDS, FIRST_PRODUCTS = 20, 40, 2000
NEW_PER_DAY, NEW_DAYS, WITHDRAWN_PER_DAY, OFFERS = 10, 3, 5, 60
SIMILAR, ACCESSORIES = 12, 8  # lengths of the lists of a product
VISITS_PER_DAY = 0.6  # of a user, mean
MORE_PRODUCTS = 0.65  # probability of another product in a visit
MOST_PRODUCTS = 8
DRIFT = 0.1  # probability per visit that one of a user's categories changes
# Shares of the sources of the next product: similar, accessory, taste, new, popular.
SOURCES = {
    "after a view": (0.50, 0.0, 0.28, 0.12, 0.10),
    "after a purchase": (0.08, 0.60, 0.18, 0.07, 0.07),
    "first of a visit": (0.22, 0.0, 0.50, 0.14, 0.14),
    "first after a purchase": (0.05, 0.35, 0.38, 0.11, 0.11),
}
DAY = 86_400
START = 1_699_920_000  # a midnight, seconds since 1970


@dataclass
class Shop:
    """The products and their lists on the current day; arrays are [products], of all days."""

    random: np.random.Generator
    days: int
    day: int = 0
    category: np.ndarray = field(init=False)
    brand: np.ndarray = field(init=False)
    log_price: np.ndarray = field(init=False)
    arrival: np.ndarray = field(init=False)  # day
    weight: np.ndarray = field(init=False)  # popularity within the shop
    withdrawn: np.ndarray = field(init=False)  # bool
    offer: np.ndarray = field(init=False)  # bool
    similar: np.ndarray = field(init=False)  # int64 [products, SIMILAR]
    accessory: np.ndarray = field(init=False)  # int64 [products, ACCESSORIES]

    def __post_init__(self) -> None:
        """Draw the products of all days, and the lists of the first day."""
        random = self.random
        num_new = NEW_PER_DAY * (self.days - 1)
        count = FIRST_PRODUCTS + num_new
        self.category = random.integers(0, CATEGORIES, count)
        self.brand = random.integers(0, BRANDS, count)
        of_category = random.normal(3.5, 0.7, CATEGORIES)
        self.log_price = of_category[self.category] + random.normal(0, 0.6, count)
        self.arrival = np.r_[np.zeros(FIRST_PRODUCTS, np.int64), 1 + np.arange(num_new) // NEW_PER_DAY]
        self.weight = 1 / (1 + random.permutation(count) / 20)
        self.withdrawn = np.zeros(count, bool)
        self.offer = np.zeros(count, bool)
        self.accessory_category = random.permutation(CATEGORIES)
        self.similar = np.zeros((count, SIMILAR), np.int64)
        self.accessory = np.zeros((count, ACCESSORIES), np.int64)
        for product in range(FIRST_PRODUCTS):
            self._draw_lists(product)

    @property
    def available(self) -> np.ndarray:
        """Whether products are on sale today, bool."""
        return (self.arrival <= self.day) & ~self.withdrawn

    @property
    def is_new(self) -> np.ndarray:
        """Whether products arrived in the last NEW_DAYS days, bool."""
        return self.available & (self.arrival > 0) & (self.day - self.arrival < NEW_DAYS)

    def _draw_lists(self, product: int) -> None:
        """Draw the lists of a product among those on sale: near in price, and popular accessories."""
        own = self.available & (self.category == self.category[product])
        own[product] = False
        nearness = np.exp(-np.abs(self.log_price - self.log_price[product]) / 0.3)
        self.similar[product] = self._drawn(own * nearness, SIMILAR)
        other = self.available & (self.category == self.accessory_category[self.category[product]])
        self.accessory[product] = self._drawn(other * self.weight, ACCESSORIES)

    def _drawn(self, weight: np.ndarray, count: int) -> np.ndarray:
        return self.random.choice(len(weight), count, replace=False, p=weight / weight.sum())

    def start_day(self, day: int) -> list[int]:
        """Withdraw products, add those of the day to lists, and draw offers. Return the products with a new price."""
        self.day = day
        if day == 0:
            return []
        old = np.flatnonzero(self.available & ((self.arrival == 0) | (self.arrival < day - 7)))
        self.withdrawn[self.random.choice(old, WITHDRAWN_PER_DAY, replace=False)] = True
        for product in np.flatnonzero(self.arrival == day).tolist():
            self._draw_lists(product)
            parents = self._drawn((self.available & (self.category == self.category[product])) * 1.0, SIMILAR)
            self.similar[parents, self.random.integers(0, SIMILAR, SIMILAR)] = product
        self.offer[:] = False
        self.offer[self._drawn(self.available * 1.0, OFFERS)] = True
        drift = self.random.normal(0, 0.03, len(self.weight))
        self.weight *= np.exp(drift)
        changed = self.random.choice(np.flatnonzero(self.available), 20, replace=False)
        self.log_price[changed] += self.random.normal(0, 0.15, len(changed))
        return changed.tolist()


def _of_lists(lists: np.ndarray, products: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Return the distribution of the products on the lists of `products`, [n, all products]."""
    n, length = len(products), lists.shape[1]
    weight = np.broadcast_to(1 / np.arange(1, length + 1), (n, length)) * available[lists[products]]
    result = np.zeros((n, len(available)))
    np.add.at(result, (np.arange(n)[:, None], lists[products]), weight)
    return _normalized(result)


def _normalized(weights: np.ndarray) -> np.ndarray:
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)


@dataclass
class Users:
    """The state of all users; arrays are [users]."""

    budget: np.ndarray  # logarithm of a price
    brands: np.ndarray  # bool [users, BRANDS]: favourites
    categories: np.ndarray  # int64 [users, 2]: current interests
    last: np.ndarray  # int64: product; -1: none
    purchased: np.ndarray  # bool: whether the last product was purchased

    @classmethod
    def drawn(cls, random: np.random.Generator, count: int) -> Users:
        """Draw users without events."""
        brands = random.random((count, BRANDS)) < 4 / BRANDS
        categories = random.integers(0, CATEGORIES, (count, 2))
        return cls(random.normal(3.5, 0.6, count), brands, categories, np.full(count, -1), np.zeros(count, bool))

    def fit(self, users: np.ndarray, shop: Shop) -> np.ndarray:
        """Return how well price and brand of each product fit, [n, products], at most 1."""
        price = shop.log_price - 0.25 * shop.offer
        distance = price - self.budget[users, None]
        return np.exp(-(distance**2) / (2 * 0.7**2)) * np.where(self.brands[users][:, shop.brand], 1.0, 0.35)

    def next_product(self, users: np.ndarray, shop: Shop, *, first: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the distribution of the next product, and the fit, both [n, products]."""
        available = shop.available
        fit = self.fit(users, shop)
        of_category = (shop.category == self.categories[users, :1]) | (shop.category == self.categories[users, 1:])
        taste = _normalized(of_category * fit * shop.weight * available)
        popular = _normalized(shop.weight * np.where(shop.offer, 3.0, 1.0) * available)
        new = _normalized(shop.is_new * fit) if shop.is_new.any() else taste
        last = np.maximum(self.last[users], 0)
        similar = _of_lists(shop.similar, last, available)
        accessory = _of_lists(shop.accessory, last, available)
        names = ("first of a visit", "first after a purchase") if first else ("after a view", "after a purchase")
        shares = np.array([SOURCES[name] for name in names])[self.purchased[users].astype(np.int64)]
        shares[self.last[users] < 0] = (0, 0, 0.7, 0.15, 0.15)
        parts = (similar, accessory, taste, new, popular)
        total = sum(shares[:, [k]] * part for k, part in enumerate(parts))
        total[np.arange(len(users)), last] *= self.last[users] < 0  # not the same product again
        return _normalized(total), fit


def generate(seed: int, num_users: int, days: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Shop, list]:
    """Return events and oracle ranks as columns, the shop after the last day, and (product, day, price) of versions."""
    random = np.random.default_rng(seed)
    shop = Shop(random, days)
    users = Users.drawn(random, num_users)
    versions = [(p, -1, shop.log_price[p]) for p in range(FIRST_PRODUCTS)]
    events: list[tuple[np.ndarray, ...]] = []
    ranks: list[tuple[np.ndarray, ...]] = []
    for day in range(days):
        for product in shop.start_day(day):
            versions.append((product, day, shop.log_price[product]))
        versions += [(p, day, shop.log_price[p]) for p in np.flatnonzero((shop.arrival == day) & (day > 0)).tolist()]
        visits = random.poisson(VISITS_PER_DAY, num_users)
        begin = np.sort(random.integers(0, DAY - 3 * 3600, (num_users, max(1, visits.max()))), axis=1)
        for nth in range(visits.max()):
            visitors = np.flatnonzero(visits > nth)
            clock = START + day * DAY + begin[visitors, nth] + 600 * nth
            _visit(random, shop, users, visitors, clock, events, ranks)
    names = ("user", "item", "time", "action", "device")
    columns = dict(zip(names, map(np.concatenate, zip(*events, strict=True)), strict=True))
    order = np.lexsort([columns["time"], columns["user"]])
    columns = {name: column[order] for name, column in columns.items()}
    of_ranks = dict(
        zip(("user", "item", "time", "action", "rank"), map(np.concatenate, zip(*ranks, strict=True)), strict=True)
    )
    return columns, of_ranks, shop, versions


def _visit(
    random: np.random.Generator, shop: Shop, users: Users, visitors: np.ndarray, clock: np.ndarray,
    events: list[tuple[np.ndarray, ...]], ranks: list[tuple[np.ndarray, ...]],
) -> None:  # fmt: skip
    """Draw the visits of `visitors`, which start at `clock`, seconds; append their events and the oracle's ranks."""
    drift = random.random(len(visitors)) < DRIFT
    users.categories[visitors[drift], random.integers(0, 2, drift.sum())] = random.integers(0, CATEGORIES, drift.sum())
    device = random.integers(0, len(DEVICES), len(visitors))
    active = np.arange(len(visitors))
    clock = clock.copy()
    deferred: list[tuple[np.ndarray, np.ndarray]] = []  # visitors and products, purchased at the end
    seen = np.zeros((len(visitors), len(shop.weight)), bool)
    for nth in range(MOST_PRODUCTS):
        of_active = visitors[active]
        probability, fit = users.next_product(of_active, shop, first=nth == 0)
        probability = _normalized(probability * ~seen[active])
        drawn = (random.random((len(active), 1)) > probability.cumsum(axis=1)).sum(axis=1)
        drawn = np.minimum(drawn, len(shop.weight) - 1)
        n = np.arange(len(active))
        seen[active, drawn] = True
        own_fit = fit[n, drawn] * np.where(shop.offer[drawn], 1.3, 1.0)
        in_cart = random.random(len(active)) < 0.08 + 0.5 * np.minimum(own_fit, 1)
        bought = in_cart & (random.random(len(active)) < 0.15 + 0.55 * np.minimum(own_fit, 1))
        action = np.where(bought, PURCHASE, np.where(in_cart, CART, VIEW))

        # The oracle ranks by the probability of the product and of its action.
        offered = np.minimum(fit * np.where(shop.offer, 1.3, 1.0), 1)
        cart = 0.08 + 0.5 * offered
        buy = cart * (0.15 + 0.55 * offered)
        of_action = np.stack([1 - cart, cart - buy, buy])[action, n]
        predicted = probability * of_action
        rank = (predicted > predicted[n, drawn][:, None]).sum(axis=1)
        ranks.append((of_active, drawn, clock[active].copy(), action, rank))

        clock[active] += random.integers(5, 60, len(active))
        view_time = ranks[-1][2]
        events.append((of_active, drawn, view_time, np.full(len(active), VIEW), device[active]))
        again = random.random(len(active)) < 0.1
        events.append(
            (of_active[again], drawn[again], clock[active][again], np.full(again.sum(), VIEW), device[active][again])
        )
        clock[active] += random.integers(5, 60, len(active))
        events.append(
            (
                of_active[in_cart],
                drawn[in_cart],
                clock[active][in_cart],
                np.full(in_cart.sum(), CART),
                device[active][in_cart],
            )
        )
        at_end = bought & (random.random(len(active)) < 0.5)
        at_once = bought & ~at_end
        clock[active] += random.integers(5, 120, len(active))
        events.append(
            (
                of_active[at_once],
                drawn[at_once],
                clock[active][at_once],
                np.full(at_once.sum(), PURCHASE),
                device[active][at_once],
            )
        )
        deferred.append((active[at_end], drawn[at_end]))
        users.last[of_active] = drawn
        users.purchased[of_active] = at_once
        clock[active] += random.integers(10, 120, len(active))
        active = active[random.random(len(active)) < MORE_PRODUCTS]
        if not len(active):
            break
    for who, product in deferred:
        clock[who] += random.integers(5, 60, len(who))
        events.append((visitors[who], product, clock[who].copy(), np.full(len(who), PURCHASE), device[who]))
        users.last[visitors[who]] = product
        users.purchased[visitors[who]] = True


def arrival_times(shop: Shop, seed: int) -> np.ndarray:
    """Return the arrivals of products, seconds since 1970; those of the first day arrived in the two years before."""
    random = np.random.default_rng([seed, 1])  # of its own: events do not depend on it
    before = random.integers(1, 730 * DAY, len(shop.arrival))
    return np.where(shop.arrival > 0, START + shop.arrival * DAY, START - before)


def write_shop(folder: Path, seed: int, users: int, days: int) -> None:
    """Generate a shop, write its tables to `folder`, and print its figures and the oracle's."""
    events, ranks, shop, versions = generate(seed, users, days)
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "user_id": [f"u{user}" for user in events["user"]],
        "item_id": [f"i{item}" for item in events["item"]],
        "timestamp": events["time"],
        "event_type": np.array(ACTIONS)[events["action"]],
        "device": np.array(DEVICES)[events["device"]],
    }
    pq.write_table(pa.table(table), folder / "events.parquet")
    product, day, log_price = map(np.array, zip(*versions, strict=True))
    items = {
        "item_id": [f"i{number}" for number in product],
        "category": [f"c{number}" for number in shop.category[product]],
        "brand": [f"b{number}" for number in shop.brand[product]],
        "price": np.exp(log_price).round(2),
        "available_from": START + day * DAY,
        "arrived": arrival_times(shop, seed)[product],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    withdrawn = [f"i{number}\n" for number in np.flatnonzero(shop.withdrawn)]
    (folder / "withdrawn.csv").write_text("item_id\n" + "".join(withdrawn), encoding="utf-8")
    of_oracle = {
        "user_id": [f"u{user}" for user in ranks["user"]],
        "item_id": [f"i{item}" for item in ranks["item"]],
        "timestamp": ranks["time"],
        "action": np.array(ACTIONS)[ranks["action"]],
        "rank": ranks["rank"],
    }
    pq.write_table(pa.table(of_oracle), folder / "oracle.parquet")

    is_last = ranks["time"] >= START + (days - 3) * DAY
    bought = is_last & (ranks["action"] == PURCHASE)
    new = shop.arrival[ranks["item"]] > (ranks["time"] - START) // DAY - NEW_DAYS
    counts = np.bincount(events["action"], minlength=3)
    print(f"{len(events['time']):,} events: " + ", ".join(f"{n:,} {a}s" for n, a in zip(counts, ACTIONS, strict=True)))
    print(f"{bought.sum():,} purchases of the last three days, {new[bought].mean():.1%} of products of those days")
    for name, group in (("all", bought), ("new products", bought & new), ("known products", bought & ~new)):
        rank = ranks["rank"][group]
        print(f"oracle, {name}: HR@10 {(rank < RANKED).mean():.3f}, NDCG@10 {ndcg(rank):.3f}")


def main() -> None:
    """Generate a shop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--days", type=int, default=90)
    args = parser.parse_args()
    write_shop(args.out, args.seed, args.users, args.days)


if __name__ == "__main__":
    main()
