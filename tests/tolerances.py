"""The tolerance of float32 scores: the terms of a sum may cancel, and its error is relative to them, not to the sum."""

from collections.abc import Sequence

import numpy as np

ROUNDING = 2.0**-24  # relative error of a float32 operation


def assert_scores_close(
    result: Sequence[float] | np.ndarray,
    expected: Sequence[float] | np.ndarray,
    width: int,
    scale: float | None = None,
    rtol: float = 1e-5,
) -> None:
    """Compare inner products of `width` terms that were summed in two orders, by two instruction sets.

    scale: the largest sum of absolute terms; by default the largest absolute score, which is a lower bound of it.
    rtol: for errors of whole products, such as those of a vector's length. Source: Higham 2002, section 3.1: the error
    of either sum is at most width · 2⁻²⁴ · Σ|terms|.
    """
    if scale is None:
        scale = float(np.abs(np.asarray(expected)).max(initial=0.0))
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=2 * width * ROUNDING * scale)
