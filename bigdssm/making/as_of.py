"""Users' features as of each row: of a user's rows in a table with times, the one that held when the row was asked.

One sort of users' and asked rows together, in the SQL that the engines share; ASOF JOIN is DuckDB's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bigdssm.making.engine import Engine
from bigdssm.making.steps import Table

ASKED = ("split", "sequence", "first", "end_", "shuffle")


def versions_of(table: str) -> str:
    """Return a query for rows of users with `nth`, of each user from 1 on by time, and `from_newest`, from its end.

    Of rows of one time the later in the table is newer.
    """
    return (
        "SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY time, place) AS nth, "
        f"row_number() OVER (PARTITION BY user_id ORDER BY time DESC, place DESC) AS from_newest FROM {table}"
    )


def join_users(engine: Engine, splits: Mapping[str, Table], num_features: int) -> tuple[dict[str, Table], int]:
    """Return the rows of splits with the features of their users as of their times, sorted as they were.

    A row sees the newest of its user's rows (`users`, of `found_users`) whose time is not after that of its first
    target; with none it has nulls. Returns, too, how many rows have none though their users are known.
    """
    engine.table("cut_rows", (Path(file) for table in splits.values() for file in table.files))
    asked = ", ".join(f"r.{name}" for name in ASKED)
    engine.view(
        "asked",
        f"SELECT s.user_id, r.time, CAST(NULL AS INT) AS version, {asked} FROM cut_rows r "
        "JOIN sequences s ON r.sequence = s.number "
        "UNION ALL SELECT user_id, time, 1 AS version, -1 AS split, 0, 0, 0, 0 FROM found_users",
    )
    # The frame of a window with an order has all rows of the current row's time.
    engine.view(
        "dated",
        "SELECT *, count(version) OVER (PARTITION BY user_id ORDER BY time) AS nth, "
        "count(version) OVER (PARTITION BY user_id) AS versions FROM asked",
    )
    features = "".join(f", users.u{number}" for number in range(num_features))
    engine.select(
        "asked_rows",
        f"SELECT {asked}, CAST(r.nth = 0 AND r.versions > 0 AS INT) AS too_early{features} FROM dated r "
        "LEFT JOIN users ON r.user_id = users.user_id AND r.nth = users.nth WHERE r.split >= 0",
        order="split, sequence, first",
    )
    ((too_early,),) = engine.fetch("SELECT count(*) FROM asked_rows WHERE too_early = 1")
    joined = {
        name: engine.select(
            f"asked_{name}", f"SELECT * FROM asked_rows WHERE split = {number}", order="sequence, first"
        )
        for number, name in enumerate(splits)
    }
    return joined, int(too_early)
