"""Calendar features of event times at the ends of their range."""

from __future__ import annotations

import numpy as np

from bigdssm.features import CalendarTime
from bigdssm.features.event_time import END_SECOND, FIRST_SECOND


def test_times_outside_the_calendar_are_missing() -> None:
    times = np.array([FIRST_SECOND - 1, FIRST_SECOND, END_SECOND - 1, END_SECOND, np.nan], np.float64)
    before, first, last, after, missing = CalendarTime().codes(times, times, 1.0).tolist()
    assert before == after == missing
    assert last - first == 23 and before not in (first, last)
