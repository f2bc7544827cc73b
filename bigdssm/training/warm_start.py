"""Initialize item embeddings from item co-occurrence in histories, by a spectral factorization.

Inner products of the vectors approximate the square roots of co-occurrence counts within a window of events. Source:
Levy and Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization", section 4.2; for square roots in place
of PPMI, Lebret and Collobert 2014, "Word Embeddings through Hellinger PCA".
"""

from typing import cast

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import ArpackError, eigsh

from bigdssm import distributed
from bigdssm.config import WarmStartConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.transitions import Transitions
from bigdssm.errors import DataError
from bigdssm.features.history import histories_of, item_codes
from bigdssm.models import DualEncoder
from bigdssm.models.embedding_tables import table_name
from bigdssm.tables.sharded import ShardedTables
from bigdssm.utils.log import get_logger

DENSE_UP_TO = 512  # items up to which a dense eigendecomposition is cheap
logger = get_logger(__name__)


def initialize_item_embeddings(
    model: DualEncoder, dataset: Dataset, config: WarmStartConfig, tables: ShardedTables | None = None
) -> None:
    """Initialize the item embeddings of a new model from histories. All ranks must call it; rank 0 computes them.

    tables: the model's sharded tables, if any. Items without co-occurrences keep their random vectors. Raises
    DataError, on every rank: no solution.
    """
    for feature in sorted({str(history.of) for history in histories_of(dataset.schema.query).values()}):
        _initialize_table(feature, model, dataset, config, tables)


def _initialize_table(
    feature: str, model: DualEncoder, dataset: Dataset, config: WarmStartConfig, tables: ShardedTables | None
) -> None:
    name = table_name("doc", feature)

    def compute() -> tuple[np.ndarray, np.ndarray]:
        return _item_vectors(dataset, feature, model.tables.shape(name), config)

    codes, vectors = map(torch.from_numpy, distributed.computed_on_main(compute))
    if tables is not None and name in tables.stores:
        tables.stores[name].initialize(codes.numpy(), vectors)
    else:
        weight = cast(torch.Tensor, model.tables.tables[name].weight)
        with torch.no_grad():
            weight[codes, : vectors.shape[1]] = vectors.to(weight)
    logger.info("%s: initialized %d items from histories", feature, len(vectors))


def _item_vectors(
    dataset: Dataset, feature: str, shape: tuple[int, int], config: WarmStartConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes with co-occurrences, int64 ascending, and their vectors float32 [codes, ≤ E]."""
    num_codes, dim = shape
    transitions = Transitions.of(dataset, config.window)
    codes = item_codes(dataset.catalogue.codes(feature, np.arange(transitions.num_docs)))
    docs = transitions.matrix().tocoo()
    code_of_index = None
    if num_codes > np.iinfo(np.int32).max:  # hashed ids use few of many codes: index those in use
        code_of_index, codes = np.unique(codes, return_inverse=True)
        num_codes = len(code_of_index)
    pairs = csr_matrix((docs.data, (codes[docs.row], codes[docs.col])), (num_codes, num_codes))
    selected = np.flatnonzero(pairs.getnnz(axis=0) + pairs.getnnz(axis=1))
    if not len(selected):
        raise DataError(f"{dataset.dir}: no train row has a history, so no {feature} values co-occur")
    try:
        vectors = spectral_vectors(pairs, dim)[selected]  # vectors of the others are rounding errors
    except ArpackError as error:
        raise DataError(f"{dataset.dir}: no warm start for {feature}: {error}; set warm_start.window to 0") from error
    root_mean_square = np.sqrt((vectors**2).sum(axis=1).mean())
    scaled = (vectors * (config.length / root_mean_square)).astype(np.float32)
    return selected if code_of_index is None else code_of_index[selected], scaled


def spectral_vectors(counts: csr_matrix, dim: int) -> np.ndarray:
    """Return V float64 [n, ≤ dim] with V Vᵀ nearest to the mean of √counts and its transpose; counts [n, n] ≥ 0."""
    roots = counts.sqrt()
    symmetric = (roots + roots.T) / 2
    size = symmetric.shape[0]
    if size <= max(DENSE_UP_TO, dim + 1):
        values, vectors = np.linalg.eigh(symmetric.toarray())
        values, vectors = values[-dim:], vectors[:, -dim:]
    else:
        values, vectors = eigsh(symmetric, dim, which="LA", v0=np.ones(size))
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])  # the sign is arbitrary
    return np.asarray(vectors * signs * np.sqrt(values.clip(0)))
