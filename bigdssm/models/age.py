"""The age of documents in the score of a dual encoder.

Both vectors have 2 K further dimensions, of K periods with angular frequencies ω. Those of a document with arrival time
t are cos(ω t) and sin(ω t). Those of a query at time s are learned amplitudes a and b, rotated by ω s, so that their
product is a function of the age s − t alone:

    Σ_k a_k cos(ω_k (s − t)) + b_k sin(ω_k (s − t))

Those of a document are scaled to a norm of DOCUMENT_NORM, and those of a query by the inverse factor: cosines between
documents remain almost those of the other dimensions. Each document, positive or negative, thus has its exact age at
the time of each query, and an indexed vector does not change with time. Source: Rahimi and Recht 2007, "Random Features
for Large-Scale Kernel Machines", for a function of a difference as a product of Fourier features.
"""

import torch
from torch import Tensor, nn

from bigdssm.features.event_time import DAY, MICROSECONDS, UNKNOWN_TIME
from bigdssm.models.blocks import time_angle

# Microseconds. Half a period resolves two days; the longest period distinguishes ages up to two years.
SHORTEST, LONGEST = 4 * DAY * MICROSECONDS, 4 * 365 * DAY * MICROSECONDS
DOCUMENT_NORM = 0.25


class AgeCoordinates(nn.Module):
    """The dimensions of age of document and query vectors; see the module.

    All queries have the same amplitudes: with those of a linear map of the query's vector, the model memorized which
    items arrived together.
    """

    def __init__(self, periods: int) -> None:
        super().__init__()
        self.periods = periods
        self.scale = DOCUMENT_NORM / periods**0.5
        self.amplitudes = nn.Parameter(torch.zeros(2 * periods))  # age has no effect at first

    def forward(self, times: Tensor) -> Tensor:
        """Return float32 [m, 2 K] for times of queries int64 [m], microseconds; zeros for an unknown time."""
        angle = self._angle(times)
        a, b = (self.amplitudes.float() / self.scale).chunk(2)
        cos, sin = angle.cos(), angle.sin()
        return _unless_unknown(torch.cat([a * cos + b * sin, a * sin - b * cos], dim=1), times)

    def of_documents(self, arrivals: Tensor) -> Tensor:
        """Return float32 [n, 2 K] for times of arrival int64 [n], as `forward`."""
        angle = self._angle(arrivals)
        return _unless_unknown(self.scale * torch.cat([angle.cos(), angle.sin()], dim=1), arrivals)

    def _angle(self, times: Tensor) -> Tensor:
        return time_angle(times, self.periods, SHORTEST, LONGEST)


def _unless_unknown(coordinates: Tensor, times: Tensor) -> Tensor:
    return coordinates.masked_fill((times == UNKNOWN_TIME).unsqueeze(1), 0.0)
