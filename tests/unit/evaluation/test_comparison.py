"""Systems of a comparison: without values they are refused, and their options are written."""

from __future__ import annotations

import numpy as np
import pytest

from bigdssm.errors import DataError
from bigdssm.evaluation.comparison import System, as_json


def test_a_system_without_values_is_refused() -> None:
    with pytest.raises(DataError, match="chain cannot be measured: no row has a relevant document"):
        System("chain", {"mrr": np.zeros(0)}, 0.0)


def test_the_options_of_a_system_are_written() -> None:
    values = {"mrr": np.array([0.5, 1.0])}
    plain, tuned = as_json([System("plain", values, 0.0), System("tuned", values, 0.0, options="two items")])
    assert "options" not in plain and tuned["options"] == "two items"
