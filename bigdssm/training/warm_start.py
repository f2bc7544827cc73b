"""Tables of items that begin where items stand to each other in histories, in place of random numbers.

Their products are as near as can be to the roots of how often two items meet within a few events. Source: Levy and
Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization", section 4.2; for the roots, in place of their
PPMI, Lebret and Collobert 2014, "Word Embeddings through Hellinger PCA".
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import ArpackError, eigsh

from bigdssm import distributed
from bigdssm.config import WarmStartConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.transitions import Transitions
from bigdssm.errors import BigDSSMError, ConfigError, DataError
from bigdssm.features.history import histories_of, item_codes
from bigdssm.models import DualEncoder
from bigdssm.models.embedding_tables import table_name
from bigdssm.utils.log import get_logger

DENSE_UP_TO = 512  # items: all eigenvectors, and not only some, cost nothing
logger = get_logger(__name__)


def check_warm_start(key: str, dataset: Dataset) -> None:
    """Raise ConfigError where the dataset has no histories that say where items stand; `key` names the setting."""
    if dataset.sequences is None or not histories_of(dataset.schema.query):
        raise ConfigError(f"{key}: rows of {dataset.dir} have no histories")


def start_items(model: DualEncoder, dataset: Dataset, config: WarmStartConfig) -> None:
    """Write the vectors of items that histories are of into the tables of a new model. A collective: rank 0 finds them.

    Items that nobody has met keep what they have. Raises DataError on every rank where there is no solution.
    """
    for feature in sorted({str(history.of) for history in histories_of(dataset.schema.query).values()}):
        weight = model.tables.tables[table_name("doc", feature)].weight
        assert isinstance(weight, torch.Tensor)
        found: tuple[np.ndarray, np.ndarray] | None = None
        error: BigDSSMError | None = None
        if distributed.is_main():
            try:
                found = _item_vectors(dataset, feature, weight.shape, config)
            except ArpackError as failed:
                error = DataError(f"{dataset.dir}: no warm start for {feature}: {failed}; set warm_start.window to 0")
            except BigDSSMError as failed:
                error = failed
        distributed.raise_together(error)
        found = distributed.broadcast_object(found)
        assert found is not None
        met, vectors = map(torch.from_numpy, found)
        with torch.no_grad():
            weight[met, : vectors.shape[1]] = vectors.to(weight)
        logger.info("%s: %d of %d items begin where histories put them", feature, len(vectors), len(weight))


def _item_vectors(
    dataset: Dataset, feature: str, shape: torch.Size, config: WarmStartConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows of a table [codes, E] have met others, bool, and their vectors, float32 [rows, at most E]."""
    num_codes, dim = shape
    found = Transitions.of(dataset, config.window)
    codes = item_codes(dataset.catalogue.codes(feature, np.arange(found.num_docs)))
    docs = found.matrix().tocoo()
    pairs = csr_matrix((docs.data, (codes[docs.row], codes[docs.col])), (num_codes, num_codes))
    met = pairs.getnnz(axis=0) + pairs.getnnz(axis=1) > 0
    if not met.any():
        raise DataError(f"{dataset.dir}: no train row has a history, so that no {feature} has met another")
    vectors = spectral_vectors(pairs, dim)[met]  # others have what rounding leaves
    length = np.sqrt((vectors**2).sum(axis=1).mean())
    return met, (vectors * (config.length / length)).astype(np.float32)


def spectral_vectors(met: csr_matrix, dim: int) -> np.ndarray:
    """Return V float64 [n, at most dim] with V Vᵀ nearest to the mean of √met and its transpose; met [n, n] ≥ 0."""
    roots = met.sqrt()
    both = (roots + roots.T) / 2
    size = both.shape[0]
    if size <= max(DENSE_UP_TO, dim + 1):
        values, vectors = np.linalg.eigh(both.toarray())
        values, vectors = values[-dim:], vectors[:, -dim:]
    else:
        values, vectors = eigsh(both, dim, which="LA", v0=np.ones(size))
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])  # either is an eigenvector
    found: np.ndarray = vectors * signs * np.sqrt(values.clip(0))
    return found
