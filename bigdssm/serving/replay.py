"""Compute logged requests again and compare features, scores and answers, to measure training-serving skew."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from bigdssm.errors import ConfigError, DataError
from bigdssm.retrieval.queries import Query
from bigdssm.retrieval.request import parse_request
from bigdssm.serving.searcher import Searcher

REPLAYED_AT_ONCE = 256  # requests per batch of the model
MOST_EXAMPLES = 10  # of a replay
TOLERANCE = 1e-4  # of scores, relative to the largest one of the answer


def replay(
    searcher: Searcher,
    log: Iterable[pa.RecordBatch],
    progress: Callable[[int], None] = lambda done: None,
    open_model: Callable[[str], Searcher | None] = lambda checksum: None,
) -> dict[str, Any]:
    """Return a report of the requests of a `log` of the searcher's model, and of those that `open_model` opens.

    A request is computed with the stored events up to its time, and differs if a feature does, or the documents, their
    order or a score beyond TOLERANCE. Requests that `forget_in_log` changed are counted alone. `open_model` returns the
    searcher of another model by its checksum, or None; it is called once per model. The report has counts of requests,
    shares of those compared, the mean overlap of the answers, and examples. Raises DataError: no request of a model.
    """
    searchers: dict[str, Searcher | None] = {searcher.versions[0]: searcher}
    counts, differing_features = Counter[str](), Counter[str]()
    examples: list[dict[str, Any]] = []
    overlap = largest_difference = 0.0

    def compare(searcher: Searcher, group: list[tuple[dict[str, Any], Query]]) -> None:
        nonlocal overlap, largest_difference
        index = searcher.versions[1]
        for (row, query), result in zip(group, searcher.answer([query for _, query in group]), strict=True):
            logged = json.loads(row["features"])
            computed = json.loads(json.dumps(searcher.queries.decoded(query.columns)))  # in JSON types, as the log
            names = [name for name in sorted({*logged, *computed}) if logged.get(name) != computed.get(name)]
            logged_scores = dict(zip(row["document"], row["score"], strict=True))
            scores = {document.key: float(document.score) for document in result.documents}
            common = logged_scores.keys() & scores.keys()
            overlap += len(common) / max(len(logged_scores), len(scores), 1)
            largest_difference = max([largest_difference, *(abs(logged_scores[key] - scores[key]) for key in common)])
            differing_features.update(names)
            counts["requests"] += 1
            counts["other_index"] += row["index"] != index
            if not names and _is_same(logged_scores, scores):
                continue
            counts["differing"] += 1
            if len(examples) < MOST_EXAMPLES:
                values = {name: {"logged": logged.get(name), "replayed": computed.get(name)} for name in names}
                answers = {"logged": list(logged_scores), "replayed": list(scores)}
                examples.append({"request": row["request"], "features": values, "documents": answers})

    for batch in log:
        groups: dict[str, list[tuple[dict[str, Any], Query]]] = {}
        for row in batch.to_pylist():
            model = row["model"]
            if model not in searchers:
                searchers[model] = open_model(model)
            of_model = searchers[model]
            if of_model is None:
                counts["other_model"] += 1
                continue
            if row["cached"] is None:
                counts["forgotten"] += 1
                continue
            try:
                query = of_model.queries.of(parse_request(json.loads(row["body"])), as_of=row["time"])
                groups.setdefault(model, []).append((row, query))
            except (ConfigError, DataError) as error:  # a withdrawn user, or values that the model does not have
                counts["invalid"] += 1
                if len(examples) < MOST_EXAMPLES:
                    examples.append({"request": row["request"], "error": str(error)})
        for model, group in groups.items():
            of_model = searchers[model]
            assert of_model is not None
            for first in range(0, len(group), REPLAYED_AT_ONCE):
                compare(of_model, group[first : first + REPLAYED_AT_ONCE])
        progress(counts["requests"])
    num_requests = counts["requests"]
    if not num_requests:
        raise DataError(
            f"the log has no request that model {searcher.versions[0][:12]} answers: {dict(counts)}; give the logged "
            "model, or a folder that has it"
        )
    return {
        **{name: counts[name] for name in ("requests", "invalid", "other_model", "forgotten", "other_index")},
        "differing": counts["differing"] / num_requests,
        "features": {name: count / num_requests for name, count in differing_features.most_common()},
        "overlap": overlap / num_requests, "largest_score_difference": largest_difference, "examples": examples,
    }  # fmt: skip


def _is_same(logged: Mapping[str, float], replayed: Mapping[str, float]) -> bool:
    """Return whether two answers, scores by key in order, are equal up to rounding; equal scores may change places."""
    tolerance = TOLERANCE * max(map(abs, [*logged.values(), *replayed.values()]), default=0.0)
    if len(logged) != len(replayed):
        return False
    return all(
        abs(score - at_position) <= tolerance
        # A document that a tie has cut off has the last score
        and abs(score - replayed.get(key, last)) <= tolerance
        for last in [*replayed.values()][-1:]
        for (key, score), at_position in zip(logged.items(), replayed.values(), strict=True)
    )
