"""Valid and invalid requests generated from the server's OpenAPI schema: all responses match it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import TinyDataset
from tests.e2e.test_page import make_served, started

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

OPERATIONS = (
    ("GET", "/"), ("GET", "/api/about"), ("GET", "/api/similar"), ("GET", "/metrics"),
    ("GET", "/healthz"), ("GET", "/readyz"),
    ("POST", "/api/search"), ("POST", "/api/why"),
)  # fmt: skip
HELD = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance",
)  # fmt: skip
REQUESTS = {"/api/search": 80, "/api/similar": 40, "/api/why": 40}  # the others have no body
# not in the OpenAPI schema: names of the tiny datasets, and nearly valid values
VALUES = st.sampled_from(
    ["u7", "i3", "river lantern", "artist", "33", "-1e38", "1e39", "inf", " ", "", "İ\x00|;\n", "𐍈" * 99]
)
MOMENTS = st.sampled_from([0, -1, 1.7e9, 1.7e12, 1e300])
FILTERS = st.sampled_from(
    ["year > 1990", "section = net", "genres in (Comedy)", "year >", "(", '"', 'title = "x"', "size <= 1e39", "", "and"]
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "user": VALUES,
        "events": st.lists(st.fixed_dictionaries({"item": VALUES}, optional={"time": MOMENTS}), max_size=12),
        "now": MOMENTS,
        "filter": FILTERS,
        "exclude_seen": st.booleans(),
        "features": st.dictionaries(
            st.sampled_from(["age", "occupation", "query", "history", ""]),
            VALUES | st.sampled_from([33, 1e39, None, [], ["artist"], [1, 2]]),
            max_size=4,
        ),
        "top": st.sampled_from([1, 3, 40, 100]),
    },
)


@pytest.fixture(scope="module", params=["interactions", "pairs"])
def schema(
    request: pytest.FixtureRequest, tiny_interactions: TinyDataset, tiny_pairs: TinyDataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[object]:  # fmt: skip
    folder = tmp_path_factory.mktemp("fuzzed")
    make_served(tiny_interactions if request.param == "interactions" else tiny_pairs, folder)
    with started(folder) as (address, server):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")
        assert server.poll() is None, "it died"


def test_every_operation_is_fuzzed(schema: object) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert found == set(OPERATIONS)


def check_answers(path: str, cases: st.SearchStrategy[object]) -> set[int]:
    """Send all requests of `cases` and return the statuses."""
    statuses = set()

    @settings(
        max_examples=REQUESTS.get(path, 3), derandomize=True, database=None, deadline=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases)
    def ask(case: object) -> None:
        response = case.call_and_validate(checks=CHECKS.get_by_names(HELD))
        statuses.add(response.status_code)
        if response.status_code >= 400:
            error = json.loads(response.content)["error"]
            assert error and "\n" not in error and len(error) < 1000

    ask()
    return statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_are_answered_as_described(schema: object, method: str, path: str) -> None:
    right = check_answers(path, schema[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    assert right and right <= {200, 400, 404}
    if path in REQUESTS:
        wrong = check_answers(path, schema[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
        assert 422 in wrong and wrong <= {400, 404, 405, 413, 422}  # lists of long texts may be too large


def test_queries_that_are_nearly_right_are_answered_as_described(schema: object) -> None:
    operation = schema["/api/search"]["POST"]
    cases = BODIES.map(lambda body: operation.Case(body=body, media_type="application/json"))
    assert check_answers("/api/search", cases) >= {200, 400}
