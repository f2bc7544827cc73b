"""The losses that a config may name, and what each goes together with; torch-free, so that the config can ask.

`losses.register` adds a term's name here, and holds the terms to what this says of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossOptions:
    """What a loss can be configured with."""

    name: str
    all_columns: bool = False  # over every column of the batch; else over in-batch and mined negatives, as configured
    directions: tuple[str, ...] = ("q2d",)
    relative: bool = True  # sees only differences of a query's scores, so that a beta of all documents cancels


LOSSES: dict[str, LossOptions] = {
    options.name: options
    for options in (
        LossOptions("fps", all_columns=True, directions=("q2d", "d2q", "both")),
        LossOptions("softmax"),
        LossOptions("pair_ce"),
        LossOptions("triplet"),
        LossOptions("sigmoid", relative=False),
    )
}
