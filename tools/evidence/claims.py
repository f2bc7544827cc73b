"""A claim as YAML: its datasets, the cells to compare, and the comparisons expected if it holds.

claim: Many negatives are better than few.
why: >-
  The summary, a paragraph on the page of verdicts.

  The setup, further paragraphs on the page of tables.
sets:
  movielens_100k: {config: configs/movielens_100k.yaml, seeds: [0, 1, 2]}
cells:
  FPS, 1,024 rows: {}                                            # the unchanged config, pretraining only
  FPS, 256 rows: {set: [pretrain.rows_global=256]}
  FPS, then PairCE: {after: "FPS, 1,024 rows", set: [sft.loss.name=pair_ce]}
  EASE: {baseline: ease, options: {regularisation: 300}}
expect:
  - {better: "FPS, 1,024 rows", than: "FPS, 256 rows"}
benches:                                                         # further measurements of the cells' models
  - about: Recall and cost of an index.
    of: ["FPS, 1,024 rows"]
    run: ["embed --model {model} --data {data} --out {folder}/vectors",
          "tools/bench/bench_index.py --model {model} --data {data} --vectors {folder}/vectors --out {out}"]
    records: indexes                                             # the key of the list of records in {out}
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import MISSING, OmegaConf

import tools.evidence.baselines  # noqa: F401, which registers them
from bigdssm.config.loading import read_yaml, to_dataclass
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import BASELINES

Verdict = Literal["holds", "does not hold", "open"]
RANK_LIMIT = 10
CLAIM_METRICS = ("ndcg_at_10", "hr_at_10")  # 0 beyond RANK_LIMIT: trials.jsonl stores no lower ranks


@dataclass(frozen=True)
class DataSet:
    """A shipped config and its dataset."""

    config: str = MISSING
    seeds: tuple[int, ...] = (0, 1, 2)
    set: tuple[str, ...] = ()  # overrides of every cell
    make: str | None = None  # arguments of make_shards, for cells without some features
    pool: str | None = None  # sets with the same pool form one result, for example years


@dataclass(frozen=True)
class Cell:
    """A training, or a baseline."""

    set: tuple[str, ...] = ()  # key=value overrides of the data set's config
    per_set: dict[str, list[str]] = field(default_factory=dict)  # by set or pool: further overrides, or options
    without: tuple[str, ...] = ()  # features to omit, such as query.age or request.device: the dataset is built without
    make: str | None = None  # arguments of make_shards for the training dataset; evaluated on the set's dataset
    after: str | None = None  # cell whose pretrained model is fine-tuned
    sft: bool = False  # fine-tune after pretraining; implied by `after`
    # arguments of score_pairs: teachers that score the hard negatives; {start}: the model of `after`
    teacher_scores: tuple[str, ...] = ()
    teacher: str | None = None  # cell whose pretrained model is the teacher (vectors) of fine-tuning
    baseline: str | None = None  # instead of a training
    options: dict[str, Any] = field(default_factory=dict)  # of the baseline
    only: tuple[str, ...] = ()  # sets and pools of the cell; empty: all


@dataclass(frozen=True)
class Expectation:
    """An expected comparison: `better` exceeds `than` by more than `margin`, or `no_better` does not."""

    better: str | None = None
    no_better: str | None = None
    than: str = MISSING
    margin: float = 0.0  # in the metric
    rows: Literal["all", "cold", "warm"] = "all"  # cold: the document is no train positive

    @property
    def cell(self) -> str:
        """Return the cell that is expected to be better, or no better."""
        return cast(str, self.better if self.better is not None else self.no_better)

    def verdict(self, low: float, high: float) -> Verdict:
        """Return the verdict for a 95 % interval of the difference between the two cells."""
        above, below = low > self.margin, high < self.margin
        held, refuted = (above, below) if self.better is not None else (below, above)
        return "holds" if held else "does not hold" if refuted else "open"


@dataclass(frozen=True)
class Bench:
    """A further measurement of models, such as latency and size: a table on the page of tables."""

    about: str = MISSING
    of: tuple[str, ...] = MISSING  # cells whose models (first seed) are measured
    run: tuple[str, ...] = MISSING  # commands or scripts with {model}, {data}, {folder}; the last one writes {out}
    records: str = MISSING  # key of the records in the JSON file {out}


@dataclass(frozen=True)
class Claim:
    """A claim and its experiment."""

    claim: str = MISSING
    why: str = ""  # first paragraph: the summary; further paragraphs: the setup
    metric: str = "ndcg_at_10"
    split: str = "test"
    sets: dict[str, DataSet] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)
    expect: list[Expectation] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)

    @property
    def pools(self) -> dict[str, list[str]]:
        """Return the sets per result: those of a pool, or a single set."""
        pools: dict[str, list[str]] = {}
        for name, data in self.sets.items():
            pools.setdefault(data.pool or name, []).append(name)
        return pools

    def cells_on(self, name: str) -> dict[str, Cell]:
        """Return the cells of the set `name`."""
        names = self._names(name)
        return {name: cell for name, cell in self.cells.items() if not cell.only or set(names) & set(cell.only)}

    def cell_on(self, set_name: str, name: str) -> Cell:
        """Return a cell with the `per_set` overrides of a set's pool and of the set."""
        cell = self.cells[name]
        more = [line for on in self._names(set_name) for line in cell.per_set.get(on, [])]
        if cell.baseline is None:
            return replace(cell, set=(*cell.set, *more), per_set={})
        options = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(more)))
        return replace(cell, options={**cell.options, **options}, per_set={})

    def _names(self, name: str) -> list[str]:
        """Return the keys of a set in `per_set` and `only`: its pool and its name."""
        pool = self.sets[name].pool
        return [name] if pool is None else [pool, name]


def read_claim(path: Path) -> Claim:
    """Read and validate the claim of a YAML file. Raises ConfigError."""
    claim = to_dataclass(path, Claim, read_yaml(path, "claim, sets, cells and expect"))
    _check(path, claim)
    return claim


def _check(path: Path, claim: Claim) -> None:
    def need(holds: bool, key: str, got: object, needed: str) -> None:
        if not holds:
            raise ConfigError(f"{path}: {key}: got {got}, needs {needed}")

    need(claim.metric in CLAIM_METRICS, "metric", claim.metric, f"one of {', '.join(CLAIM_METRICS)}")
    need(bool(claim.sets), "sets", "none", "at least one")
    need(bool(claim.cells), "cells", "none", "at least one")
    for name, data in claim.sets.items():
        for key, folder in ((f"sets.{name}", name), (f"sets.{name}.pool", data.pool)):
            plain = folder is None or (folder not in (".", "..", "data") and not set(folder) & set("/\\\0"))
            need(plain, key, ascii(folder), "the name of a folder in --out: no slashes, and not data")
        need(all(0 <= seed < 2**32 for seed in data.seeds), f"sets.{name}.seeds", list(data.seeds), "0 to 2**32 - 1")
        need(len(set(data.seeds)) == len(data.seeds) > 0, f"sets.{name}.seeds", list(data.seeds), "each once")
    for name, cell in claim.cells.items():
        key = f"cells.{name}"
        kinds = f"one of {', '.join(BASELINES)}"
        need(cell.baseline is None or cell.baseline in BASELINES, f"{key}.baseline", cell.baseline, kinds)
        trained = replace(cell, baseline=None, options={}, per_set={}, make=None, only=()) != Cell()
        allowed = "baseline, options, per_set, make and only"
        need(cell.baseline is None or not trained, key, "keys of a training", allowed)
        need(cell.baseline is not None or not cell.options, f"{key}.options", cell.options, "a baseline that has them")
        need(not cell.make or not cell.without, f"{key}.make", cell.make, "no `without`")
        need(
            not cell.teacher_scores or cell.after is not None,
            f"{key}.teacher_scores",
            list(cell.teacher_scores),
            "after",
        )
        need(cell.teacher is None or cell.after is not None, f"{key}.teacher", cell.teacher, "after")
        for role, named in (("per_set", list(cell.per_set)), ("only", list(cell.only))):
            known = {*claim.sets, *claim.pools}
            need(set(named) <= known, f"{key}.{role}", named, f"some of {', '.join(sorted(known))}")
        for role, other in (("after", cell.after), ("teacher", cell.teacher)):
            if other is not None:
                before = claim.cells.get(other)
                fits = before is not None and before.baseline is None and before.after is None
                need(fits, f"{key}.{role}", other, "a cell that pretrains")
                assert before is not None
                need(before.without == cell.without, f"{key}.without", list(cell.without), f"those of {other}")
                same = role == "after" or cell.make == before.make  # its vectors are of one dataset
                need(same, f"{key}.make", cell.make, f"that of {other}")
                missing = [on for on in claim.sets if name in claim.cells_on(on) and other not in claim.cells_on(on)]
                need(not missing, f"{key}.{role}", other, f"a cell that also runs on {', '.join(missing)}")
    for pool, members in claim.pools.items():
        need(
            members == [pool] or pool not in claim.sets,
            f"sets.{pool}",
            "a set",
            f"a name other than that of a pool, {pool}",
        )
        for name in members[1:]:
            seeds, first = claim.sets[name].seeds, claim.sets[members[0]].seeds
            need(seeds == first, f"sets.{name}.seeds", list(seeds), f"those of {members[0]}, of the same pool")
            cells, others = (", ".join(claim.cells_on(one)) for one in (name, members[0]))
            need(cells == others, f"sets.{name}", f"the cells {cells}", f"those of {members[0]}: {others}")
    for number, expected in enumerate(claim.expect):
        key = f"expect[{number}]"
        one = (expected.better is None) != (expected.no_better is None)
        need(one, key, "both or none", "better or no_better")
        for cell_name in (expected.cell, expected.than):
            need(cell_name in claim.cells, key, cell_name, f"one of the cells {', '.join(claim.cells)}")
        need(expected.cell != expected.than, key, f"{expected.cell} against itself", "two cells")
    need(not claim.benches or len(claim.sets) == 1, "sets", ", ".join(claim.sets), "one, where there are benches")
    for number, bench in enumerate(claim.benches):
        key, models = f"benches[{number}]", [name for name, cell in claim.cells.items() if cell.baseline is None]
        of_models = bool(bench.of) and set(bench.of) <= set(models)
        need(of_models, f"{key}.of", list(bench.of), f"some of {', '.join(models)}")
        need(bool(bench.run) and "{out}" in bench.run[-1], f"{key}.run", list(bench.run), "{out} in the last")
