"""Claims: validation of their files, verdicts of intervals, and the generated page."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bigdssm.cluster.launcher import FinishedCommand
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.comparison import MeasuredRows, System, read_ranks, save_comparison
from bigdssm.evaluation.metrics import paired_bootstrap, row_metrics
from tools.evidence.__main__ import main
from tools.evidence.benches import read_benchmarks, run_benchmarks
from tools.evidence.claims import CLAIM_METRICS, RANK_LIMIT, Claim, Expectation, read_claim
from tools.evidence.page import OVERVIEW, as_markdown, tables_as_markdown, write_page
from tools.evidence.results import CellResult, Result, SetResult, collect, together
from tools.evidence.running import Trial, _config_content, cpu_seconds, plan_trials, run_trial, run_trials, write_config
from tools.evidence.stored import StoredTrial, pack_ranks, read_trials, with_finished, write_trials

ROOT = Path(__file__).resolve().parents[2]
EARLIER_CELLS = {  # by claim: cells whose figures are of an earlier version of the package
    "interaction": ("early, from scratch", "early, from FPS", "early, from FPS, 100 re-ranked"),
    "score": ("dot, norm penalty .001", "dot, norm penalty .01"),
}
CLAIM: dict[str, Any] = {
    "claim": "a is more than b",
    "sets": {"small": {"config": "config.yaml", "seeds": [0, 1]}},
    "cells": {"a": {}, "b": {"set": ["pretrain.epochs=2"]}, "c": {"after": "a"}},
    "expect": [{"better": "a", "than": "b"}],
}


def written(tmp_path: Path, **changed: Any) -> Path:
    path = tmp_path / "claim.yaml"
    path.write_text(yaml.safe_dump({**CLAIM, **changed}))
    return path


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"sets": {}}, "sets: got none, needs at least one"),
        ({"cells": {}}, "cells: got none"),
        ({"metric": "mrr"}, "metric: got mrr, needs one of ndcg_at_10, hr_at_10"),
        (
            {"sets": {"small": {"config": "x", "seeds": [1, 1]}}},
            r"sets.small.seeds: got \[1, 1\], needs each once",
        ),
        ({"sets": {"small": {"seeds": [1]}}}, "required key sets.small.config is missing"),
        ({"cells": {"a": {"sets": []}}}, "sets"),
        ({"cells": {"a": {"baseline": "knn"}}, "expect": []}, "cells.a.baseline: got knn, needs one of popularity"),
        ({"cells": {"a": {"baseline": "ease", "set": ["x=1"]}}, "expect": []}, "cells.a: got keys of a training"),
        ({"cells": {"a": {"options": {"k": 1}}}, "expect": []}, "cells.a.options"),
        ({"cells": {"a": {"only": ["big"]}}, "expect": []}, r"cells.a.only: got \['big'\], needs some of small"),
        (
            {"cells": {"a": {"per_set": {"big": ["x=1"]}}}, "expect": []},
            r"cells.a.per_set: got \['big'\], needs some of small",
        ),
        ({"cells": {"a": {"after": "d"}}, "expect": []}, "cells.a.after: got d, needs a cell that pretrains"),
        ({"cells": {"a": {"make": "pairs", "without": ["doc.x"]}}, "expect": []}, "cells.a.make: got pairs, needs no"),
        (
            {"cells": {"a": {"teacher_scores": ["--bm25"]}}, "expect": []},
            r"cells.a.teacher_scores: got \['--bm25'\], needs after",
        ),
        (
            {
                "sets": {**CLAIM["sets"], "large": {"config": "config.yaml"}},
                "cells": {**CLAIM["cells"], "a": {"only": ["large"]}},
            },
            "cells.c.after: got a, needs a cell that also runs on small",
        ),
        ({"cells": {"a": {"teacher": "a"}}, "expect": []}, "cells.a.teacher: got a, needs after"),
        (
            {"cells": {**CLAIM["cells"], "d": {"after": "a", "teacher": "c"}}},
            "cells.d.teacher: got c, needs a cell that pretrains",
        ),
        (
            {"cells": {**CLAIM["cells"], "d": {"after": "a", "teacher": "b", "make": "pairs"}}},
            "cells.d.make: got pairs, needs that of b",
        ),
        (
            {"sets": {"x": {"config": "c", "pool": "z"}, "y": {"config": "c", "seeds": [0], "pool": "z"}}},
            r"sets.y.seeds: got \[0\], needs those of x, of the same pool",
        ),
        (
            {
                "sets": {"x": {"config": "c", "pool": "z"}, "y": {"config": "c", "pool": "z"}},
                "cells": {**CLAIM["cells"], "d": {"only": ["x"]}},
            },
            "sets.y: got the cells a, b, c, needs those of x: a, b, c, d",
        ),
        (
            {"sets": {"x": {"config": "c", "pool": "y"}, "y": {"config": "c"}}},
            "sets.y: got a set, needs a name other than that of a pool, y",
        ),
        ({"expect": [{"better": "a", "than": "z"}]}, r"expect\[0\]: got z, needs one of the cells a, b, c"),
        ({"benches": [{"about": "x", "of": ["z"], "run": ["{out}"], "records": "y"}]}, r"benches\[0\].of: got \['z'\]"),
        ({"benches": [{"about": "x", "of": ["a"], "run": ["embed"], "records": "y"}]}, "needs {out} in the last"),
        ({"benches": [{"about": "x", "of": ["a"], "run": ["{out}"]}]}, "records"),
        *(
            ({"sets": {name: {"config": "x"}}}, r"sets\..*: got '.*', needs the name of a folder in --out")
            for name in ("../evil", "/evil", "a/b", "..", "data", "a\\b")
        ),
        ({"sets": {"x": {"config": "c", "pool": "../z"}}}, r"sets\.x\.pool: got '\.\./z', needs the name of a folder"),
        ({"sets": {"x": {"config": "c", "seeds": [2**63 - 1]}}}, r"sets\.x\.seeds: got .*, needs 0 to 2\*\*32 - 1"),
        ({"expect": [{"better": "a", "than": "a"}]}, r"expect\[0\]: got a against itself, needs two cells"),
        ({"expect": [{"better": "a", "no_better": "b", "than": "c"}]}, "got both or none, needs better or no_better"),
    ],
)
def test_invalid_claims_are_refused(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_claim(written(tmp_path, **changed))


def test_files_that_are_not_claims(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("claim: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, sentence in (("no", "cannot be read"), ("bad", "is not valid YAML"), ("list", "contains a list")):
        with pytest.raises(ConfigError, match=sentence):
            read_claim(tmp_path / f"{name}.yaml")


def test_verdicts_of_confidence_intervals() -> None:
    better, none = Expectation(better="a", than="b"), Expectation(no_better="a", than="b", margin=0.005)
    assert [better.verdict(*i) for i in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == ["holds", "open", "does not hold"]
    assert [none.verdict(*i) for i in ((-0.1, 0.004), (-0.1, 0.006), (0.006, 0.1))] == [
        "holds",
        "open",
        "does not hold",
    ]
    assert together(["holds", "holds"]) == "holds" and together([]) == together(["holds", "open"]) == "open"
    assert together(["open", "does not hold"]) == "does not hold"


def test_cells_that_are_alike_share_a_folder(tmp_path: Path, tiny_interactions: Any) -> None:
    one = {"small": {"config": str(tiny_interactions.config), "seeds": [0, 1]}}
    claim = read_claim(written(tmp_path, sets=one, cells={**CLAIM["cells"], "same": {"set": ["pretrain.epochs=2"]}}))
    found = {(trial.cell_name, trial.seed): trial for trial in plan_trials(claim, tmp_path)}
    assert len(found) == 8 and found["same", 0].folder == found["b", 0].folder != found["a", 0].folder
    assert found["c", 1].after == found["a", 1] and found["c", 1].folder.name == "seed-1"
    two = {**one, "other": one["small"]}
    cells = {**CLAIM["cells"], "b": {"set": ["pretrain.epochs=5"], "per_set": {"small": ["pretrain.epochs=2"]}}}
    here = {
        (t.set_name, t.cell_name, t.seed): t
        for t in plan_trials(read_claim(written(tmp_path, sets=two, cells=cells)), tmp_path)
    }
    assert here["small", "b", 0].folder == found["b", 0].folder, (
        "equal overrides share a folder, whether from `set` or `per_set`"
    )
    assert here["other", "b", 0].folder.parent.name != found["b", 0].folder.parent.name
    later = read_claim(written(tmp_path, sets=one, cells={**CLAIM["cells"], "a": {"set": ["pretrain.epochs=3"]}}))
    again = {(trial.cell_name, trial.seed): trial for trial in plan_trials(later, tmp_path)}
    assert again["c", 1].folder != found["c", 1].folder, (
        "a changed pretraining cell changes the folder of cells after it"
    )
    with pytest.raises(DataError, match="not finished: small: a, seed 0; small: a, seed 1; "):
        collect(claim, list(found.values()), {})
    config = Path(tiny_interactions.config)
    changed = tmp_path / "other.yaml"
    changed.write_text(config.read_text().replace("max_items: 10", "max_items: 9"))
    assert "max_items: 9" in changed.read_text()
    other = read_claim(written(tmp_path, sets={"small": {"config": str(changed)}}))
    assert plan_trials(other, tmp_path)[0].folder != found["a", 0].folder, "the config's content counts, not its name"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"cells": {**CLAIM["cells"], "d": {"set": ["pretrain.epoch=2"]}}}, "d on small: .*unknown key pretrain.epoch"),
        ({"cells": {**CLAIM["cells"], "d": {"set": ["pretrain.steps=-1"]}}}, "d on small: .*pretrain.steps: got -1"),
        ({}, "cells.c on small: the config has no section `sft:`"),
        ({"cells": {**CLAIM["cells"], "d": {"without": ["doc.genre"]}}}, "cells.d.without: doc.genre is no feature"),
        ({"cells": {**CLAIM["cells"], "d": {"without": ["doc.genres"]}}}, "sets.small.make: missing"),
        (
            {"cells": {**CLAIM["cells"], "d": {"baseline": "ease", "options": {"regularisation": -1}}}},
            "cells.d on small: the baseline ease: regularisation: got -1, needs above 0",
        ),
        (
            {"cells": {"a": {}, "b": {"set": ["pretrain.steps=9"]}, "c": {"set": ["pretrain.steps=9"]}},
             "expect": [{"better": "b", "than": "c"}]},
            r"expect\[0\]: b and c are the same on small, needs two cells that differ",
        ),
    ],
)  # fmt: skip
def test_infeasible_trials_are_refused_before_the_first(
    tmp_path: Path, tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], sentence: str
) -> None:
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [0, 1]}}
    monkeypatch.setattr("tools.evidence.running.run_trial", lambda trial: pytest.fail("it has begun"))
    claim = read_claim(written(tmp_path, sets=sets, **changed))
    with pytest.raises(ConfigError, match=sentence):
        run_trials(plan_trials(claim, tmp_path / "out"), 1)


def test_a_cell_without_a_feature_of_events_has_no_request_of_it(tmp_path: Path) -> None:
    config = str(ROOT / "configs/evidence/sets/generated_shop.yaml")
    cells = {"a": {}, "b": {"without": ["event.action", "request.gap"]}}
    sets = {"shop": {"config": config, "make": "interactions"}}
    trials = plan_trials(read_claim(written(tmp_path, sets=sets, cells=cells)), tmp_path / "out")
    data = _config_content(next(trial for trial in trials if trial.cell.without)).data
    assert (list(data.event), list(data.request)) == (["device", "gap"], ["device"])


def test_a_record_that_a_kill_cut_off_does_not_take_the_next_with_it(tmp_path: Path, tiny_interactions: Any) -> None:
    """A truncated record does not corrupt the next one."""
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [0]}}
    claim = read_claim(written(tmp_path, sets=sets, cells={"a": {"baseline": "popularity"}}, expect=[]))
    (trial,) = plan_trials(claim, tmp_path)
    trial.folder.mkdir(parents=True)
    (trial.folder / "commands.jsonl").write_text('{"command": "pre')
    run_trial(trial)
    assert cpu_seconds(trial) >= 0 and '\n{"command": "baseline"' in (trial.folder / "commands.jsonl").read_text()


def test_baselines_are_fitted_one_at_a_time(
    tmp_path: Path, tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the random state and the CPU time of the process."""
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [0]}}
    cells = {name: {"baseline": "markov", "options": {"window": window}} for window, name in enumerate("abc", start=1)}
    claim = read_claim(written(tmp_path, sets=sets, cells=cells, expect=[]))
    at_once, most = [0], [0]

    def fit(*arguments: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        raise ConfigError("enough")

    monkeypatch.setattr("tools.evidence.running.fit_baseline", fit)
    with pytest.raises(ConfigError, match="enough"):
        run_trials(plan_trials(claim, tmp_path), 3)
    assert most == [1]


def test_a_baselines_options_may_differ_by_set(tmp_path: Path, tiny_interactions: Any) -> None:
    sets = {name: {"config": str(tiny_interactions.config), "seeds": [0]} for name in ("one", "other")}
    cells = {
        "Markov": {"baseline": "markov", "per_set": {"other": ["window=1"]}},
        "Markov, window 1": {"baseline": "markov", "options": {"window": 1}},
    }
    claim = read_claim(written(tmp_path, sets=sets, cells=cells, expect=[], split="validation"))
    found = {}
    for trial in plan_trials(claim, tmp_path):
        run_trial(trial)
        found[trial.set_name, trial.cell_name] = trial.folder.parent.name, read_ranks(trial.report).ranks
    name, ranks = found["other", "Markov, window 1"]
    assert found["other", "Markov"][0] == name != found["one", "Markov"][0]
    np.testing.assert_array_equal(found["other", "Markov"][1], ranks)
    assert not np.array_equal(found["one", "Markov"][1], ranks)


def test_the_page_is_its_figures(tmp_path: Path) -> None:
    """The pages are generated from results.json, except the head of the page of claims."""
    figures = json.loads((ROOT / "tools/evidence/results.json").read_text("utf-8"))
    results = {name: Result.from_dict(content) for name, content in figures.items()}
    assert {name: json.loads(json.dumps(result.to_dict())) for name, result in results.items()} == figures
    page = (ROOT / "docs/evidence.md").read_text("utf-8")
    assert page[page.index(OVERVIEW) :] == as_markdown(results, "evidence_tables.md")
    assert (ROOT / "docs/evidence_tables.md").read_text("utf-8") == tables_as_markdown(results, "evidence.md")
    assert {path.stem for path in (ROOT / "configs/evidence").glob("*.yaml")} == set(results)
    for name, result in results.items():
        claim = read_claim(ROOT / f"configs/evidence/{name}.yaml")
        assert (result.claim, result.why) == (claim.claim, claim.why), "the file changed: write the pages again"
        if name in EARLIER_CELLS:
            assert len(claim.expect) < len(result.expect)
        else:
            assert len(claim.expect) == len(result.expect), "the file changed: write the pages again"
        shipped = ROOT / f"docs/images/evidence_{name}.svg"
        assert 2000 < shipped.stat().st_size < 40_000
    least = min(results, key=lambda name: sum(len(one.cells) for one in results[name].sets.values()))
    write_page({least: results[least]}, tmp_path / "page.md")
    written_page = (tmp_path / "page.md").read_text("utf-8")
    assert f"page_tables.md#{least}" in written_page and written_page.startswith("# Claims\n")
    (tmp_path / "page.md").write_text(f"A head.\n\n{written_page[written_page.index(OVERVIEW) :]}", "utf-8")
    write_page({least: results[least]}, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text("utf-8").startswith(f"A head.\n\n{OVERVIEW}")
    (tmp_path / "other.md").write_text("A page of mine.\n")
    with pytest.raises(ConfigError, match=r"other\.md has no line `\| claim \| verdict \|"):
        write_page({least: results[least]}, tmp_path / "other.md")
    assert (tmp_path / "other.md").read_text() == "A page of mine.\n"
    assert f"page.md#{least}" in (tmp_path / "page_tables.md").read_text("utf-8")
    picture = (tmp_path / f"images/evidence_{least}.svg").read_text("utf-8")
    assert len(picture) < 40_000
    assert all(f">{cell.cell}</text>" in picture for one in results[least].sets.values() for cell in one.cells)


def test_summaries_on_the_page_have_three_sentences_and_the_figures_of_the_results() -> None:
    figures = json.loads((ROOT / "tools/evidence/results.json").read_text("utf-8"))
    for name, content in figures.items():
        result = Result.from_dict(content)
        summary = result.why.partition("\n")[0]
        assert len(re.findall(r"\.(?= |$)", summary)) == 3, name
        interval = r"[+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]"
        (decisive,) = re.findall(interval, result.decisive())
        assert decisive in summary, name
        compared = {str(comparison) for one in result.sets.values() for comparison in one.expected if comparison}
        assert compared.issuperset(re.findall(interval, summary)), name
        tables = tables_as_markdown({name: result}, "evidence.md")
        assert all(number in tables for number in re.findall(r"\d\.\d{4}", summary)), name


def test_a_change_of_texts_is_written_to_the_pages_without_the_dataset(tmp_path: Path, tiny_interactions: Any) -> None:
    """Changed texts of a claim update the pages if the dataset does not exist."""
    config = tmp_path / "config.yaml"
    config.write_text(tiny_interactions.config.read_text())
    sets = {"small": {"config": str(config), "seeds": [0], "set": [f"data.dir={tmp_path}/none"]}}
    cells = {"a": {}, "b": {"set": ["pretrain.epochs=2"]}}
    cell = CellResult("a", 0.5, 0.1, 1, 9.0, None, [0.5])
    earlier = Result(
        "the earlier claim", "", "ndcg_at_10", "test", ["a beats b"],
        {"small": SetResult(["small"], 5, 5, 0, [cell], [None])}, "open",
    )  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"claim": earlier.to_dict()}))

    def collected(**changed: Any) -> tuple[str, str]:
        file = written(tmp_path, sets=sets, cells=cells, **changed)
        page = tmp_path / "page.md"
        assert main([str(file), "--out", str(tmp_path / "runs"), "--page", str(page), "--collect"]) == 0
        return page.read_text("utf-8"), page.with_name("page_tables.md").read_text("utf-8")

    page, tables = collected(claim="the claim", why="A summary.\nA setup.")
    assert "*the claim* — **open**.\n\nA summary.\n" in page and "A setup." not in page
    assert "\n\nA setup.\n" in tables and "A summary." not in tables
    page, _ = collected(claim="another claim", expect=[{"better": "b", "than": "a"}])
    assert "another claim" not in page, "its comparisons differ from those of the results"


def test_measurements_are_stored_apart_from_the_runs(tmp_path: Path, tiny_interactions: Any) -> None:
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [0, 1]}}
    cells = {"a": {}, "b": {"set": ["pretrain.epochs=2"]}, "c": {"after": "a"}}
    claim = read_claim(written(tmp_path, sets=sets, cells=cells, split="validation"))
    dataset = Dataset.open(load_config(tiny_interactions.config).data.dir)
    planned = plan_trials(claim, tmp_path / "here")
    query_ids = MeasuredRows.of(dataset, "validation").query_ids
    rng = np.random.default_rng(0)
    for trial in planned:
        better = 3 if trial.cell_name == "a" else 9
        ranks = rng.integers(1, better + trial.seed + 1, len(query_ids)).astype(np.float64)
        save_comparison(trial.report, [System.from_ranks("x", ranks, query_ids, 1.0)], [], dataset, "validation")
        (trial.folder / "commands.jsonl").write_text(json.dumps({"command": "pretrain", "cpu_seconds": 9000.0}) + "\n")
    file = tmp_path / "trials.jsonl"
    write_trials(file, with_finished({}, planned[:2]))
    write_trials(file, with_finished(read_trials(file), planned[2:]))
    elsewhere = plan_trials(claim, tmp_path / "there")
    found = collect(claim, elsewhere, read_trials(file))
    assert found == collect(claim, planned, with_finished({}, planned))
    cell = found.sets["small"].cells[0]
    assert (cell.cell, cell.seeds, cell.cpu_seconds) == ("a", 2, 9000.0)
    assert found.sets["small"].cells[2].cpu_seconds == 18000.0, "a cell's cpu_seconds include its pretraining"
    assert found.cpu_hours == 15.0, "cpu_hours counts shared pretraining once"
    (compared,) = found.sets["small"].expected
    assert found.decisive() == f"a beats b: {compared} on small"
    near = replace(compared, margin=compared.high + 0.001)
    assert near.distance == pytest.approx(0.001), "distance is measured from the margin"
    both = np.stack([read_ranks(trial.report).ranks for trial in planned[:2]])
    assert cell.mean == pytest.approx(row_metrics(both.ravel())["ndcg_at_10"].mean(), abs=5e-5)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0].replace('"first_ranks": "', '"first_ranks": "AAAA'), *lines[1:]]))
    with pytest.raises(DataError, match="are damaged"):
        collect(claim, elsewhere, read_trials(file))
    file.write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        read_trials(file)


def claim_of_years(folder: Path, config: Path) -> Claim:
    """Return a claim on a pool of two sets, and on a third set; `per_set` of the pool applies to its sets."""
    years = {year: {"config": str(config), "seeds": [0, 1], "pool": "years"} for year in ("x", "y")}
    of_years = {"only": ["years"], "set": ["pretrain.epochs=2"], "per_set": {"years": ["pretrain.rows_global=8"]}}
    of_years["per_set"]["y"] = ["pretrain.rows_global=16"]  # type: ignore[index]
    cells = {"a": {}, "b": of_years}
    expect = [{**CLAIM["expect"][0], "rows": rows} for rows in ("all", "warm", "cold")]
    sets = {**years, "z": {**years["x"], "pool": None}}
    claim = read_claim(written(folder, sets=sets, cells=cells, expect=expect))
    assert claim.pools == {"years": ["x", "y"], "z": ["z"]} and list(claim.cells_on("z")) == ["a"]
    assert claim.cell_on("x", "b").set == ("pretrain.epochs=2", "pretrain.rows_global=8")
    assert claim.cell_on("y", "b").set[1:] == ("pretrain.rows_global=8", "pretrain.rows_global=16")
    return claim


def test_sets_of_a_pool_are_counted_together(
    tmp_path: Path, tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a user in both sets are resampled together."""
    claim = claim_of_years(tmp_path, tiny_interactions.config)
    dataset, rng = Dataset.open(load_config(tiny_interactions.config).data.dir), np.random.default_rng(0)
    query_ids = MeasuredRows.of(dataset, "test").query_ids
    planned, ranks = plan_trials(claim, tmp_path), dict[tuple[str, str, int], np.ndarray]()
    for trial in planned:
        own = rng.integers(1, 5 if trial.cell_name == "a" else 9, len(query_ids)).astype(np.float64)
        ranks[trial.set_name, trial.cell_name, trial.seed] = own
        save_comparison(trial.report, [System.from_ranks("x", own, query_ids, 1.0)], [], dataset, "test")
        spent = {"command": "pretrain", "cpu_seconds": 10.0 if trial.set_name == "x" else 20.0}
        (trial.folder / "commands.jsonl").write_text(json.dumps(spent) + "\n")
    popularity = np.arange(len(query_ids)) % 3
    monkeypatch.setattr("tools.evidence.results._popularity", lambda dataset, split: popularity)
    found = collect(claim, planned, with_finished({}, planned))
    one = found.sets["years"]
    assert (one.members, one.rows, one.query_ids) == (["x", "y"], 2 * len(query_ids), len(query_ids))
    assert found.sets["z"].expected == [None] * 3 and [cell.cpu_seconds for cell in one.cells] == [15.0, 15.0]

    def pooled(cell: str) -> np.ndarray:
        seeds = [np.concatenate([ranks[year, cell, seed] for year in "xy"]) for seed in (0, 1)]
        return np.stack([row_metrics(of_seed)["ndcg_at_10"] for of_seed in seeds])

    is_warm = np.tile(popularity > 0, 2)
    for compared, selected in zip(one.expected, (is_warm | True, is_warm, ~is_warm), strict=True):
        assert compared is not None and selected.any()
        values = pooled("a")[:, selected], pooled("b")[:, selected]
        expected = paired_bootstrap(*values, np.tile(query_ids, 2)[selected])
        assert (compared.mean, compared.low, compared.high) == tuple(
            round(value, 4) for value in (expected.mean, expected.low, expected.high)
        )
    assert found.expect[1] == "a beats b on warm rows"
    assert f"years (x, y), test, {one.rows} rows of {one.query_ids} query ids, 2 seeds:" in tables_as_markdown(
        {"n": found}, "page.md"
    )


def test_stored_trials_are_not_rerun_unless_another_starts_from_them(
    tmp_path: Path, tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [0]}}
    cells = {
        "a": {},
        "b": {"set": ["pretrain.epochs=2"]},
        "tuned": {"after": "a", "set": ["sft.steps=1"]},
        "taught": {"after": "a", "teacher": "b", "set": ["sft.distillation.name=batch_kl"]},
    }
    planned = plan_trials(read_claim(written(tmp_path, sets=sets, cells=cells)), tmp_path)
    begun: list[str] = []
    monkeypatch.setattr("tools.evidence.running.run_trial", lambda trial: begun.append(trial.cell_name))
    run_trials(planned, 2, {trial.name for trial in planned if trial.cell_name in ("a", "b")})
    assert sorted(begun[:2]) == ["a", "b"] and sorted(begun[2:]) == ["taught", "tuned"]
    begun.clear()
    run_trials(planned, 2, {trial.name for trial in planned if trial.cell_name != "tuned"})
    assert begun == ["a", "tuned"], "b is not rerun: it is the teacher of another cell"
    begun.clear()
    run_trials(planned, 2, {trial.name for trial in planned if trial.cell_name != "b"})
    assert begun == ["b"]


def test_a_cell_trains_on_its_own_dataset_and_is_measured_on_the_set(
    tmp_path: Path, tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [0]}}
    cells = {"all": {}, "bright": {"make": "interactions --positive-rating 4"}}
    whole, bright = plan_trials(read_claim(written(tmp_path, sets=sets, cells=cells, expect=[])), tmp_path)
    assert whole.folder != bright.folder
    ran: list[tuple[str, ...]] = []

    def record(log: Path, *line: str) -> FinishedCommand:
        ran.append(line)
        return FinishedCommand(line, log, 0, 1.0, 1.0)

    monkeypatch.setattr("tools.evidence.running.run_command", record)
    run_trial(bright)
    made = load_config(bright.config_file).data.dir
    of_set = load_config(tiny_interactions.config).data.dir
    assert made.startswith(str(tmp_path)) and made != of_set
    assert ran[0] == ("make_shards", "interactions", "--config", str(bright.config_file), "--positive-rating", "4")
    assert [line[0] for line in ran] == ["make_shards", "pretrain", "evaluate"]
    assert ran[2][ran[2].index("--data") + 1] == of_set


COUNT = """
import json, sys
model, data, out = sys.argv[1:]
json.dump({'found': [{'what': data, 'ms': 1234.567, 'bytes': 98765}]}, open(out, 'w'))
"""


def test_measurements_of_tools_are_on_the_page_and_not_repeated(
    tmp_path: Path, tiny_interactions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    sets = {"small": {"config": str(tiny_interactions.config), "seeds": [3, 1]}}
    run = [f"{script} {{model}} {{data}} {{out}}"]
    bench = {"about": "What it costs.", "of": ["b", "a"], "run": run, "records": "found"}
    cells = {"a": {}, "b": {"set": ["pretrain.epochs=2"]}}
    claim = read_claim(written(tmp_path, sets=sets, cells=cells, benches=[bench]))
    planned = plan_trials(claim, tmp_path / "runs")
    with pytest.raises(DataError, match="not finished: small: b, seed 3: What it costs"):
        read_benchmarks(claim, planned)
    trained: list[str] = []

    def train(which: list[Trial], at_once: int) -> None:
        trained.extend(str(trial) for trial in which)
        for trial in which:
            trial.folder.mkdir(parents=True)
            write_config(trial)

    monkeypatch.setattr("tools.evidence.benches.run_trials", train)
    run_benchmarks(claim, planned)
    assert trained == ["small: b, seed 3", "small: a, seed 3"], "of the first seed"
    run_benchmarks(claim, planned)
    assert len(trained) == 2
    (figures,) = read_benchmarks(claim, planned)
    data = load_config(tiny_interactions.config).data.dir
    assert figures.records[1] == {"cell": "a", "what": data, "ms": 1234.567, "bytes": 98765}
    result = Result("more", "", "ndcg_at_10", "test", [], {}, "open", [figures])
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    header = "| cell | what | ms | bytes |\n| --- | --- | --- | --- |"
    shown = f"What it costs.\n\n{header}\n| b | {data} | 1,235 | 98,765 |"
    assert shown in tables_as_markdown({"costs": result}, "page.md")


def test_the_stored_ranks_give_the_metrics_of_the_exact_ranks() -> None:
    rng = np.random.default_rng(0)
    ranks = np.concatenate([rng.integers(2, 60, 1000) / 2, rng.integers(1, 10**6, 1000), [10.0, 10.5, 11.0]])
    found = StoredTrial("x", "test", "", True, 0.0, pack_ranks(ranks)).saved().ranks
    np.testing.assert_array_equal(found[ranks <= RANK_LIMIT], ranks[ranks <= RANK_LIMIT])
    exact, stored = row_metrics(ranks), row_metrics(found)
    for metric in CLAIM_METRICS:
        np.testing.assert_array_equal(stored[metric], exact[metric])
    for wrong in (1.25, np.nan):
        with pytest.raises(DataError, match="not a multiple of 1/2"):
            pack_ranks(np.array([1.0, wrong]))


def test_the_page_can_be_computed_from_the_stored_trials() -> None:
    """Every seed of every cell of the shipped claims has a stored trial, and there are no others.

    Except for cells that only an earlier version of the package can train: their figures and trials are kept.
    """
    stored = read_trials(ROOT / "tools/evidence/trials.jsonl")
    figures = json.loads((ROOT / "tools/evidence/results.json").read_text("utf-8"))
    used = set()
    earlier_trials = 0
    for name, content in figures.items():
        claim = read_claim(ROOT / f"configs/evidence/{name}.yaml")
        planned = plan_trials(claim, Path("runs/evidence"))
        assert [str(trial) for trial in planned if trial.name not in stored] == [], name
        used |= {trial.name for trial in planned}
        values: dict[tuple[str, str], list[np.ndarray]] = {}
        seconds: dict[tuple[str, str], list[float]] = {}
        for trial in planned:
            of_seed = row_metrics(stored[trial.name].saved().ranks)[claim.metric]
            values.setdefault((trial.set_name, trial.cell_name), []).append(of_seed)
            seconds.setdefault((trial.set_name, trial.cell_name), []).append(stored[trial.name].cpu_seconds)
        for one in content["sets"].values():
            for cell in one["cells"]:
                if cell["cell"] in EARLIER_CELLS.get(name, ()):
                    earlier_trials += cell["seeds"] * len(one["members"])
                    continue
                of_members = [(member, cell["cell"]) for member in one["members"]]
                rows = np.concatenate([np.stack(values[of]) for of in of_members], axis=1)
                assert rows.shape == (cell["seeds"], one["rows"])
                assert cell["mean"] == pytest.approx(rows.mean(), abs=5.1e-5), (name, cell)
                spent = np.mean([second for of in of_members for second in seconds[of]])
                assert cell["cpu_seconds"] == pytest.approx(spent, abs=0.051), (name, cell)
    assert used <= set(stored)
    assert len(stored) == len(used) + earlier_trials == 355
