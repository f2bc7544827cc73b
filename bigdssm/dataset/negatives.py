"""Which documents may be negatives at a time: one rule for every kind of negative."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bigdssm.dataset.catalogue import NO_ROWS
from bigdssm.dataset.dataset import Dataset
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.features.history import histories_of


@dataclass(frozen=True)
class NegativeDocuments:
    """The documents that may be negatives of a query at its time, see `allow`.

    Shapes: m queries, k draws, n documents of N in the catalogue.
    """

    num_docs: int  # N
    withdrawn: np.ndarray = field(default_factory=lambda: NO_ROWS)  # int64, catalogue rows
    # int64, catalogue rows: items with unknown ids, if ids are dropped
    unknown: np.ndarray = field(default_factory=lambda: NO_ROWS)
    since: np.ndarray | None = None  # float64 [N]: time from which a document is available; None: no times

    @classmethod
    def of(cls, dataset: Dataset, id_dropout: float) -> "NegativeDocuments":
        """Return those of a dataset and a model with this `model.tables.id_dropout`."""
        catalogue = dataset.catalogue
        unknown = NO_ROWS
        if id_dropout:
            rows = np.arange(catalogue.num_docs)
            for name in {str(history.of) for history in histories_of(dataset.schema.query).values()}:
                is_unknown = catalogue.codes(name, rows) == OUT_OF_VOCABULARY
                unknown = np.union1d(unknown, rows[is_unknown])
        since = dataset.item_times if dataset.header.dated else None
        return cls(catalogue.num_docs, catalogue.withdrawn, unknown, since)

    def allow(self, documents: np.ndarray, times: np.ndarray | None = None, *, given: bool = False) -> np.ndarray:
        """Return whether `documents` (int64 [n]) may be negatives: bool [n], or [m, n] at `times` (float64 [m]).

        An unknown item is no negative where ids are dropped: it is never a positive, and training would rank all new
        items last. A withdrawn one is not drawn from the catalogue; it is a negative where the data has it (`given`: in
        a row of the batch, or in a list of candidates), since it was offered then. None is a negative before its time.
        """
        allowed = ~np.isin(documents, self.unknown)
        if not given:
            allowed &= ~np.isin(documents, self.withdrawn)
        if times is None:
            return allowed
        later = np.zeros((len(times), len(documents)), bool)
        if self.since is not None:
            later = self.since[documents] > times[:, None]
        return allowed & ~later

    @cached_property
    def undrawn(self) -> np.ndarray:
        """The documents that are never drawn from the catalogue, int64, ascending."""
        return np.flatnonzero(~self.allow(np.arange(self.num_docs)))

    @cached_property
    def oldest_first(self) -> np.ndarray:
        """The other documents, int64: oldest first, or in their order if items have no times."""
        rows = np.flatnonzero(self.allow(np.arange(self.num_docs)))
        return rows if self.since is None else rows[np.argsort(self.since[rows], kind="stable")]

    def draw(self, random: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Turn random numbers (uint64 [m, k]) into documents int64 [m, k] that are available at `times` (float64 [m]).

        The result is -1 where none is available.
        """
        number = np.full(len(times), len(self.oldest_first))
        if self.since is not None:
            number = np.searchsorted(self.since[self.oldest_first], times, "right")  # NaN, an unknown time: all
        position = (random % np.maximum(number, 1).astype(np.uint64)[:, None]).astype(np.int64)
        documents = np.append(self.oldest_first, -1)[position]  # position 0 exists without any document
        return np.where(number[:, None] > 0, documents, -1)
