"""Random filters with a plain definition of a match, and rows with missing, several and rounded values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from bigdssm.features import Categorical, Feature, Numeric, Vocabulary

Row = dict[str, Any]

SHOPS = ("corner", "two words", 'say "hi"', "or", "not", "a!b", "(1)")
TAGS = ("red", "green", "blue", "and")
RARE = "rare"  # a value out of the vocabulary
PRICES = (0.1, 12.5, -3.0, 2.0**24, 2.0**24 + 1, 1e30, 0.0)  # 2**24 + 1 needs 25 bits
FEATURES: dict[str, Feature] = {
    "shop": Categorical(vocabulary=Vocabulary.of(SHOPS)).with_name("shop"),
    "tags": Categorical(multi=True, vocabulary=Vocabulary.of(TAGS)).with_name("tags"),
    "price": Numeric().with_name("price"),
}


def random_rows(random: Random, number: int) -> list[Row]:
    """Return rows by feature: a text ('' if missing), a list of texts, a number (NaN if missing)."""
    return [
        {
            "shop": random.choice(("", RARE, *SHOPS)),
            "tags": random.sample((RARE, *TAGS), random.choice((0, 0, 1, 2, 3))),
            "price": random.choice((math.nan, *PRICES)),
        }
        for _ in range(number)
    ]


def random_filter(random: Random, depth: int = 3) -> tuple[str, Callable[[Row], bool]]:
    """Return the text of a filter, and its definition."""
    text, matches, _ = _expression(random, depth)
    return text, matches


def _expression(random: Random, depth: int) -> tuple[str, Callable[[Row], bool], str]:
    """Return text, definition, and the word that joins its parts: or, and, or none."""
    if depth == 0 or random.random() < 0.3:
        return *_condition(random), ""
    word = random.choice(("or", "and"))
    parts = [_expression(random, depth - 1) for _ in range(random.choice((2, 2, 3)))]
    texts = []
    for text, _, inner in parts:
        needs_parentheses = word == "and" and inner == "or"
        texts.append(f"({text})" if needs_parentheses or random.random() < 0.2 else text)
    every = [matches for _, matches, _ in parts]
    joined = random.choice((f" {word} ", f"\n{word.upper()}  ")).join(texts)
    return joined, lambda row: (any if word == "or" else all)(matches(row) for matches in every), word


def _condition(random: Random) -> tuple[str, Callable[[Row], bool]]:
    name = random.choice(("shop", "tags", "price"))
    texts: tuple[str, ...] = {"shop": SHOPS, "tags": TAGS, "price": tuple(map(repr, PRICES))}[name]
    signs = ("=", "!=", "in", "not in", *(("<", "<=", ">", ">=") if name == "price" else ()))
    operator = random.choice(signs)
    if "in" in operator:
        values = random.sample(texts, random.choice((1, 2, 3)))
        text = f"{name} {random.choice((operator, operator.upper()))} ({', '.join(map(json.dumps, values))})"
    else:
        values = [random.choice(texts)]
        quoted = json.dumps(values[0]) if name != "price" or random.random() < 0.5 else values[0]
        text = f"{name}{random.choice(('', ' '))}{operator}{random.choice(('', ' '))}{quoted}"

    def matches(row: Row) -> bool:
        if name == "price":
            own, operands = rounded(row["price"]), [rounded(float(value)) for value in values]
            if math.isnan(own):
                return False
            orders = {
                "<": own < operands[0],
                "<=": own <= operands[0],
                ">": own > operands[0],
                ">=": own >= operands[0],
            }
            return orders.get(operator, (own in operands) == (operator in ("=", "in")))
        has = [value for value in (row[name] if name == "tags" else [row[name]]) if value]
        return bool(has) and any(value in values for value in has) == (operator in ("=", "in"))

    return text, matches


def rounded(number: float) -> float:
    """Return the nearest number of 24 bits (IEEE float32)."""
    return float(struct.unpack("f", struct.pack("f", number))[0])
