"""A score that is no product: an MLP on [u, w, u * w], the comparison for what an index can serve.

Shapes: D vector width, … leading dimensions of queries and documents, which broadcast against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

PREFIX = "scorer."  # of its weights in a whole model


class MlpScorer(nn.Module):
    """Scores of pairs; `hidden` are the widths of its hidden layers, at least one. Source: He et al. 2017, eq. 11."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.widths = dim, tuple(hidden)
        # The first layer in three parts: a query's and a document's are computed once for all pairs that they are in.
        self.of_query = nn.Linear(dim, hidden[0])
        self.of_doc = nn.Linear(dim, hidden[0], bias=False)
        self.of_product = nn.Linear(dim, hidden[0], bias=False)
        layers: list[nn.Module] = [nn.GELU()]
        for width, following in zip(hidden, [*hidden[1:], 1], strict=True):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.rest = nn.Sequential(*layers[:-1])

    @staticmethod
    def named(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return its weights in the state of a whole model, where it is called `scorer`, by their names there."""
        return {name: tensor for name, tensor in whole.items() if name.startswith(PREFIX)}

    def copy(self, whole: Mapping[str, Tensor]) -> MlpScorer:
        """Return a copy with the weights that it has in the state of a whole model."""
        scorer = MlpScorer(*self.widths)
        scorer.load_state_dict({name.removeprefix(PREFIX): t for name, t in self.named(whole).items()})
        return scorer

    def forward(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the scores […] of queries and documents […, D]."""
        scores: Tensor = self.rest(self.of_query(u) + self.of_doc(w) + self.of_product(u * w))
        return scores.squeeze(-1)
