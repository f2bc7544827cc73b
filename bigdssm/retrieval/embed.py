"""Index vectors of queries and documents, whose inner product is the training score.

A document's index vector is [alpha * w, beta] and a query's [u, 1]; their product is alpha * <u, w> + beta. Those of a
model without beta are alpha * w and u, of width D where D+1 is written here.
Shapes: m queries, n documents, N catalogue rows, D the towers' width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.dataset.catalogue import NO_ROWS, Catalogue
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, ragged
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.features.ragged import Column
from bigdssm.loader.batch import paddings, to_features
from bigdssm.loader.step_plan import NOTHING_PACKED, encode_in_chunks
from bigdssm.losses.contrastive import truncate
from bigdssm.models import DualEncoder, Encoded, Values
from bigdssm.models.dual_encoder import document_head, query_head
from bigdssm.models.precision import resolve_precision
from bigdssm.retrieval.shards import WHOLE, Share
from bigdssm.utils.device import device_of
from bigdssm.utils.log import Progress, no_progress

ROWS_AT_ONCE = 16_384  # rows converted from columns to tensors at a time


@dataclass(frozen=True)
class Encoders:
    """Both towers as functions from rows to float32 index vectors."""

    queries: Callable[[Rows], Tensor]  # Rows of m queries -> [m, D+1]
    documents: Callable[[np.ndarray], Tensor]  # int64 [n] catalogue rows -> [n, D+1]
    has_beta: bool = field(default=True, kw_only=True)  # whether the last number is beta, and 1 of queries


@dataclass(frozen=True)
class DocumentVectors:
    """Index vectors [n, D+1] of the catalogue rows from `first` on: a rank's share, or all."""

    vectors: Tensor  # float32
    first: int = 0
    withdrawn: np.ndarray = field(default_factory=lambda: NO_ROWS)  # int64: catalogue rows that are no answers
    since: Tensor | None = None  # float64 [n]: no answers to requests at earlier times; None: to all

    @cached_property
    def absent(self) -> Tensor:
        """The positions of the withdrawn documents held here, int64."""
        rows = torch.from_numpy(self.withdrawn).to(self.vectors.device)
        return rows[self.hold(rows)] - self.first

    def __len__(self) -> int:
        """Return n."""
        return len(self.vectors)

    def hold(self, rows: Tensor) -> Tensor:
        """Return bool: which of the catalogue rows are held here."""
        return (rows >= self.first) & (rows < self.first + len(self))


def tower_encoders(model: nn.Module, dataset: Dataset, device: torch.device | None = None) -> Encoders:
    """Return the Encoders of `model`: a DualEncoder, or an engine around one; vectors are on its device.

    Calls use the model's own forward in evaluation mode, so engines that shard parameters work, too. With a process
    group a call is a collective. Rows are encoded in chunks of similar length.
    """
    towers = cast(DualEncoder, getattr(model, "module", model))
    device = device_of(model) if device is None else device
    packed = towers.accepts_packed(training=False)
    has_contents = not towers.content_ids

    def queries(rows: Rows) -> Tensor:
        nonlocal has_contents
        if not has_contents:  # once: those of the current weights
            towers.set_contents(item_contents(model, dataset, device))
            has_contents = True
        tower = partial(query_vectors, model)
        return encode_features(dataset.schema.query, rows.inputs, len(rows), tower, device, packed.query)

    def documents(doc_rows: np.ndarray) -> Tensor:
        columns, tower = dataset.catalogue.columns(doc_rows), partial(document_vectors, model)
        return encode_features(dataset.schema.doc, columns, len(doc_rows), tower, device, packed.doc)

    return Encoders(queries, documents, has_beta=towers.has_beta)


def encode_features(
    declared: Mapping[str, Feature], columns: Mapping[str, Column], num_rows: int,
    encode: Callable[[dict[str, Values]], Tensor], device: torch.device | str = "cpu",
    packed: frozenset[str] = NOTHING_PACKED.query,
) -> Tensor:  # fmt: skip
    """Apply `encode` to the columns of declared features as tensors, see `encode_in_chunks`."""
    features = to_features(declared, columns)
    return encode_in_chunks(features, paddings(declared), num_rows, encode, device, packed)


def item_contents(model: nn.Module, dataset: Dataset, device: torch.device | str = "cpu") -> Tensor:
    """Return the contents of all items, float32 [1 + N, D]: the document tower's vectors, with unknown ids.

    They have no dimensions of age. The first row is zero. With a process group a call is a collective.
    """
    towers = cast(DualEncoder, getattr(model, "module", model))
    unknown = towers.content_ids

    def vectors(features: dict[str, Values]) -> Tensor:
        ids = {name: torch.full_like(cast(Tensor, features[name]), OUT_OF_VOCABULARY) for name in unknown}
        return tower_output(model, "doc", {**features, **ids})[:, : towers.tower_dim].float()

    packed = towers.accepts_packed(training=False).doc
    declared = dataset.schema.doc
    catalogue = dataset.catalogue
    share = Share(distributed.rank(), distributed.world_size())
    begin, end = share.of(catalogue.num_docs)
    parts = []
    for chunk in range(share.num_chunks(catalogue.num_docs, ROWS_AT_ONCE)):
        rows = np.arange(begin, end)[chunk * ROWS_AT_ONCE : (chunk + 1) * ROWS_AT_ONCE]
        columns = catalogue.columns(rows)
        parts.append(encode_features(declared, columns, len(rows), vectors, device, packed))
    bounds = share.bounds(catalogue.num_docs)
    contents = distributed.all_gather_rows(torch.cat(parts), [last - first for first, last in bounds])
    return torch.cat([contents.new_zeros(1, contents.shape[1]), contents])


def check_width(option: str, width: int, dim: int) -> None:
    """Raise ConfigError if vectors with `dim` dimensions cannot be truncated to `width`."""
    if not 1 <= width <= dim:
        raise ConfigError(f"{option} {width}: the model's vectors are {dim} wide, needs 1 to {dim}")


def truncate_vectors(vectors: Tensor, width: int, normalize: bool, has_beta: bool = True) -> Tensor:
    """Truncate index vectors [n, D+1] to [n, width+1]; normalize: restore the norm (without beta).

    For models trained with loss.widths (Matryoshka); set `normalize` for cosine models.
    """
    end = vectors.shape[1] - has_beta
    first = truncate(vectors, width, normalize)
    if normalize:
        first = first * vectors[:, :end].norm(dim=1, keepdim=True)
    return torch.cat([first, vectors[:, end:]], dim=1)


def truncate_encoders(encoders: Encoders, width: int, normalize: bool) -> Encoders:
    """Return Encoders whose vectors are truncated to [.., width+1]."""
    cut = partial(truncate_vectors, width=width, normalize=normalize, has_beta=encoders.has_beta)
    return Encoders(
        lambda rows: cut(encoders.queries(rows)),
        lambda doc_rows: cut(encoders.documents(doc_rows)),
        has_beta=encoders.has_beta,
    )


def encode_in(model: nn.Module, precision: str) -> str:
    """Compute the products of `model` in fp32, bf16 or the faster one (auto); weights and vectors stay float32.

    Call it once per model: a later fp32 does not undo bf16. Returns the precision: fp32 or bf16. MiniLM on a Xeon with
    AMX encodes 16,700 tokens per CPU-second in bf16 and 5,900 in fp32.
    """
    device_type = device_of(model).type
    resolved = resolve_precision(precision, model, device_type)
    if resolved == "bf16":
        model.forward = torch.autocast(device_type, torch.bfloat16)(model.forward)
    return resolved


def tower_output(model: nn.Module, side: str, features: Mapping[str, Values]) -> Tensor:
    """Encode the features of a side to the tower's output, U [m, D] or W [n, D]."""
    output = encode(model, query=features).U if side == "query" else encode(model, doc=features).W
    assert output is not None
    return output


def query_vectors(model: nn.Module, query: Mapping[str, Values]) -> Tensor:
    """Encode the features of m queries to float32 [m, D+1]."""
    has_beta = cast(DualEncoder, getattr(model, "module", model)).has_beta
    return query_head(tower_output(model, "query", query), has_beta)


def document_vectors(model: nn.Module, doc: Mapping[str, Values]) -> Tensor:
    """Encode the features of n documents to float32 [n, D+1]."""
    encoded = encode(model, doc=doc)
    assert encoded.W is not None
    return document_head(encoded.W, encoded.alpha.float(), encoded.beta)


def all_finite(vectors: Tensor) -> bool:
    """Return whether all numbers are finite, without allocating a tensor of their size."""
    return not vectors.numel() or all(bool(edge.isfinite()) for edge in vectors.aminmax())


def encode_catalogue(encoders: Encoders, catalogue: Catalogue, share: Share = WHOLE) -> DocumentVectors:
    """Encode this rank's share of the catalogue. All ranks must call it."""
    num_docs = catalogue.num_docs
    begin, end = share.of(num_docs)
    vectors: Tensor | None = None
    for chunk in range(share.num_chunks(num_docs, share.rows_per_chunk)):
        first = begin + chunk * share.rows_per_chunk
        rows = np.arange(first, min(first + share.rows_per_chunk, end))
        # A rank without rows left encodes one anyway: a sharded model's forward is a collective.
        chunk_vectors = encoders.documents(rows if len(rows) else np.zeros(1, np.int64))
        if vectors is None:  # filled in place: concatenating chunks would need twice the memory
            vectors = chunk_vectors.new_empty(end - begin, chunk_vectors.shape[1])
        vectors[first - begin : first - begin + len(rows)] = chunk_vectors[: len(rows)]
        share.progress("documents encoded", min(first + share.rows_per_chunk, end) - begin, end - begin)
    assert vectors is not None, "the catalogue is empty"
    return DocumentVectors(vectors, begin, catalogue.withdrawn)


def encode_queries(
    encoders: Encoders,
    dataset: Dataset,
    split: str,
    share: Share = WHOLE,
    rows: Iterable[Rows | None] | None = None,
) -> Iterator[tuple[Rows, Tensor]]:
    """Yield (m single-query rows, vectors [m, D+1]) of this rank's share of the split, or of `rows`.

    `rows` need as many chunks on every rank, so that all ranks call the encoder (a collective of a sharded model) and
    yield equally often; m is 0 for a chunk without queries. Exhaust the iterator.
    """
    for piece in iterate_share(dataset, split, share, "queries encoded") if rows is None else rows:
        if piece is not None and piece.num_queries:
            single = dataset.one_query_per_row(piece)
            yield single, encoders.queries(single)
        else:
            placeholder = next(placeholder for placeholder in dataset.iterate(split, 1024) if len(placeholder))
            yield placeholder.take(np.zeros(0, np.int64)), encoders.queries(placeholder)[:0]


def iterate_share(dataset: Dataset, split: str, share: Share, what: str) -> Iterator[Rows | None]:
    """Yield this rank's share of the split in chunks, then None until the longest share is exhausted.

    `what` labels the progress.
    """
    chunks = dataset.iterate(split, share.rows_per_chunk, share.rank, share.world_size)
    num_rows, at_once = dataset.num_rows(split), dataset.rows_for_queries(split, share.rows_per_chunk)
    begin, end = share.of(num_rows)
    for chunk in range(share.num_chunks(num_rows, at_once)):
        yield next(chunks, None)
        share.progress(what, min((chunk + 1) * at_once, end - begin), end - begin)


def encode_columns(
    features: Mapping[str, Feature], columns: Mapping[str, Column],
    encode: Callable[[dict[str, Values]], Tensor], what: str = "rows encoded", progress: Progress = no_progress,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Apply `encode` to columns (at least one row), ROWS_AT_ONCE rows as padded tensors on `device` at a time.

    The result is on the host.
    """
    num_rows, parts = len(next(iter(columns.values()))), []
    for first in range(0, num_rows, ROWS_AT_ONCE):
        rows = np.arange(first, min(first + ROWS_AT_ONCE, num_rows))
        piece = {name: ragged.take(column, rows) for name, column in columns.items()}
        parts.append(encode_features(features, piece, len(rows), encode, device).cpu())
        progress(what, first + len(rows), num_rows)
    return torch.cat(parts)


def encode(model: nn.Module, **sides: Mapping[str, Values]) -> Encoded:
    """Run `model` on features of a side in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            encoded: Encoded = model(**sides)
    finally:
        model.train(was_training)
    return encoded
