"""The pages of the claims: verdicts with one figure per claim, below a head that is kept, and all tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from bigdssm.errors import ConfigError
from bigdssm.utils.atomic import write_text
from tools.evidence.results import CellResult, Result, SetResult

METRICS = {"ndcg_at_10": "NDCG@10", "hr_at_10": "HR@10", "mrr": "MRR", "recall_at_100": "Recall@100"}
_COORDINATES = re.compile(r' (?:d|x|y|height|width|transform|points)="[^"]*"')
OVERVIEW = "| claim | verdict | decisive comparison | CPU-hours |\n|---|---|---|---|\n"
HEAD = """# Claims

[The page of all tables and comparisons]({tables}) has the setup. Differences between cells (trained models or
baselines) are paired by row, with 95 % bootstrap intervals over queries and seeds, clustered by query id. A claim
**holds** if every interval is on the expected side of 0 (or of the margin of the claim), **does not hold** if one is on
the other side, and is **open** otherwise. Of the comparisons with this verdict, the decisive one has the interval
whose end is nearest to 0 or the margin. CPU-hours are totals over all training runs of a claim. The left side of a
figure has the metric of each cell with its standard error, the right side the metric by tenths of the queries, sorted
by the popularity of their document.

"""
TABLES_HEAD = """# Tables of the experiments

The setup of each experiment, the results of all cells, and all comparisons; [the page of claims]({page}) has the
verdicts and the method. `python -m tools.evidence` generates this page from the stored results.

± is a standard error over queries and seeds. The rare and the popular half are the test rows whose documents have fewer
or more positives in training. Cold rows, whose documents have none, are in neither half; their number is in
parentheses. CPU-seconds are per training run, including pretraining and teachers. A comparison lists the expectation,
the difference between its two cells with the 95 % interval, and the verdict.
"""


def write_page(results: Mapping[str, Result], page: Path) -> None:
    """Write the page, its page of tables and its figures (in `images/`); `results` by the name of the claim's file.

    The head of an existing page is kept. Raises ConfigError: the page has no table of claims.
    """
    tables = tables_path(page)
    head = head_of(page) or HEAD.format(tables=tables.name)
    for name, result in results.items():
        _draw(result, page.parent / "images" / f"evidence_{name}.svg")
    write_text(page, head + as_markdown(results, tables.name))
    write_text(tables, tables_as_markdown(results, page.name))


def head_of(page: Path) -> str:
    """Return the text above the table of claims; "" without a page. Raises ConfigError: it has no such table."""
    head, table, _ = (page.read_text("utf-8") if page.exists() else OVERVIEW).partition(OVERVIEW)
    if not table:
        header, rule = OVERVIEW.splitlines()
        raise ConfigError(
            f"{page} has no line `{header}` with `{rule}` below it, above which the text is kept; add both lines, or "
            "choose another --page"
        )
    return head


def tables_path(page: Path) -> Path:
    """Return the path of the page of tables of a page."""
    return page.with_name(f"{page.stem}_tables.md")


def as_markdown(results: Mapping[str, Result], tables: str) -> str:
    """Return the page of verdicts below its head as Markdown, with links to the page `tables`."""
    overview = ""
    for name, result in results.items():
        link = f"[{_cell(result.claim)}](#{_anchor(name)})"
        overview += f"| {link} | {result.verdict} | {_cell(result.decisive())} | {result.cpu_hours:.1f} |\n"
    sections = [_section(name, result, tables) for name, result in results.items()]
    return OVERVIEW + "\n".join([overview, *sections])


def tables_as_markdown(results: Mapping[str, Result], page: str) -> str:
    """Return the page of tables and comparisons as Markdown, with links to the page of verdicts, `page`."""
    sections = [_tables_section(name, result, page) for name, result in results.items()]
    return "\n".join([TABLES_HEAD.format(page=page), *sections])


def _cell(text: str) -> str:
    """Escape a text for a table cell."""
    return text.replace("|", "\\|")


def _title(name: str) -> str:
    return name.replace("_", "-").capitalize()


def _anchor(name: str) -> str:
    """Return the anchor of a claim's section on both pages."""
    return name.replace("_", "-")


def _paragraphs(why: str) -> tuple[str, list[str]]:
    """Return the first paragraph of a claim's explanation, the summary, and the further ones, the setup."""
    first, *further = [" ".join(paragraph.split()) for paragraph in why.split("\n") if paragraph.strip()] or [""]
    return first, further


def _section(name: str, result: Result, tables: str) -> str:
    lines = [f"## {_title(name)}", "", f"*{result.claim}* — **{result.verdict}**."]
    if summary := _paragraphs(result.why)[0]:
        lines += ["", summary]
    lines += ["", f"![{name.replace('_', ' ')}](images/evidence_{name}.svg)"]
    return "\n".join([*lines, "", f"[Setup, tables and comparisons]({tables}#{_anchor(name)})", ""])


def _tables_section(name: str, result: Result, page: str) -> str:
    lines = [f"## {_title(name)}", "", f"[{result.claim}]({page}#{_anchor(name)}) — **{result.verdict}**."]
    for paragraph in _paragraphs(result.why)[1]:
        lines += ["", paragraph]
    label = METRICS.get(result.metric, result.metric)
    for set_name, one in result.sets.items():
        seeds = max(cell.seeds for cell in one.cells)
        of = f" ({', '.join(one.members)})" if one.members != [set_name] else ""
        lines += ["", f"{set_name}{of}, {result.split}, {_number(one)}, {seeds} seed{'s' * (seeds > 1)}:", ""]
        lines += _table(one, label)
        compared = [(words, found) for words, found in zip(result.expect, one.expected, strict=True) if found]
        lines += ["", *(f"- {words}: {comparison}: {comparison.verdict}" for words, comparison in compared)]
    for figures in result.figures:
        lines += ["", figures.about, "", *_records(figures.records)]
    return "\n".join([*lines, ""])


def _number(one: SetResult) -> str:
    """Return for example `4,979 rows of 34 query ids`."""
    return f"{one.rows:,} rows" + (f" of {one.query_ids:,} query ids" if one.query_ids < one.rows else "")


def _table(one: SetResult, label: str) -> list[str]:
    cold = f" | cold ({one.cold_rows})" if one.cold_rows else ""
    lines = [f"| | {label} | rare half | popular half{cold} | CPU-seconds |", "|---|" + "---|" * (4 + bool(cold))]
    for cell in one.cells:
        cells = [f"{cell.mean:.4f} ± {cell.error:.4f}", *_halves(cell)]
        if cold:
            cells.append("–" if cell.cold is None else f"{cell.cold:.4f}")
        lines.append(f"| {_cell(cell.cell)} | {' | '.join(cells)} | {cell.cpu_seconds:,.0f} |")
    return lines


def _records(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return records with equal keys as a table."""
    header = [list(records[0]), ["---"] * len(records[0])]
    rows = [*header, *([_format(value) for value in record.values()] for record in records)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else _cell(str(value))


def _halves(cell: CellResult) -> list[str]:
    """Return the metric of rare and of popular documents, a dash without such documents."""
    middle = len(cell.deciles) // 2
    halves = cell.deciles[:middle], cell.deciles[middle:]
    return [f"{sum(half) / len(half):.4f}" if half else "–" for half in halves]


def _draw(result: Result, path: Path) -> None:
    """Plot the cells per set with standard errors, and the metric by deciles of popularity."""
    number = len(result.sets)
    height = 1.2 + 0.34 * max(len(one.cells) for one in result.sets.values())
    label = METRICS.get(result.metric, result.metric)
    style = {"svg.hashsalt": "bigdssm", "svg.fonttype": "none", "font.size": 9, "font.sans-serif": ["DejaVu Sans"]}
    with rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, height * number), layout="constrained")
        for axes, (name, one) in zip(figure.subplots(number, 2, squeeze=False), result.sets.items(), strict=True):
            cells = one.cells[::-1]
            for y, cell in enumerate(cells):
                axes[0].errorbar(cell.mean, y, xerr=cell.error, fmt="o", ms=4, color=f"C{y % 10}")
                axes[1].plot(range(1, len(cell.deciles) + 1), cell.deciles, color=f"C{y % 10}", lw=1)
            axes[0].set_yticks(range(len(cells)), [cell.cell for cell in cells])
            axes[0].tick_params(axis="y", length=0)
            axes[0].set_ylim(-0.6, len(cells) - 0.4)
            axes[0].set_xlabel(f"{label}, {name}")
            axes[1].set_xlabel("tenths of the queries, rare documents first")
            axes[1].set_ylabel(label)
            axes[0].grid(alpha=0.3)
            axes[1].grid(alpha=0.3, axis="y")
        picture = StringIO()
        figure.savefig(picture, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _smaller(picture.getvalue()))


def _smaller(svg: str) -> str:
    """Reduce a Matplotlib SVG to a quarter of its size: one decimal, shared styles, only referenced ids."""
    svg = re.sub(r' id="[\w.]*_\d+"| transform="rotate\(-0[^"]*"', "", svg)
    svg = _COORDINATES.sub(_rounded, svg)
    styles = Counter(re.findall(r'style="([^"]*)"', svg))
    names = {style: f"s{number}" for number, style in enumerate(styles)}
    svg = re.sub(r'style="([^"]*)"', lambda found: f'class="{names[found[1]]}"', svg)
    rules = "".join(f".{name}{{{style}}}\n" for style, name in names.items())
    return "\n".join(line.strip() for line in svg.replace("</style>", f"\n{rules}</style>").splitlines()) + "\n"


def _rounded(coordinates: re.Match[str]) -> str:
    """Round the numbers of an attribute to one decimal, on one line."""
    numbers = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), coordinates[0])
    return re.sub(r"\s*\n\s*", " ", numbers)
