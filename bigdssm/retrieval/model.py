"""Python API of a model folder: encode dicts, texts, Arrow tables and data frames.

Shapes: m queries, n documents, D vector width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from bigdssm.checkpoints.model_folder import ModelFolder, fetch_from_hub, load_model_folder
from bigdssm.features import Feature
from bigdssm.features.canonical import columns_of_values
from bigdssm.retrieval.embed import (
    document_vectors,
    encode_columns,
    query_vectors,
)
from bigdssm.utils.arguments import checked
from bigdssm.utils.device import device_of, find_device


@dataclass(frozen=True)
class Model:
    """A loaded model; the inner product of a query and a document vector is the training score.

    Rows are a list of dicts (feature → value), a list of strings if a side has one text feature, an Arrow table or a
    pandas data frame with one column per feature. A history is a list of item values, oldest first, and
    HISTORY.FEATURE the list of a feature of its events; absent features are missing values.
    """

    folder: ModelFolder

    @property
    def checksum(self) -> str:
        """Return the checksum that identifies the model in vectors and indexes."""
        return self.folder.checksum

    def encode_queries(self, rows: Any) -> np.ndarray:
        """Encode queries to [m, D+1], or [m, D] without beta. Raises DataError: an unknown feature or bad value."""
        schema = self.folder.schema
        return self._encode(rows, schema.query, query_vectors, schema.request)

    def encode_documents(self, rows: Any) -> np.ndarray:
        """Encode documents to [n, D+1], or [n, D] without beta. Raises DataError: an unknown feature or bad value."""
        return self._encode(rows, self.folder.schema.doc, document_vectors)

    def _encode(
        self, rows: Any, features: Mapping[str, Feature], encode: Callable[[nn.Module, Any], Tensor],
        request: Sequence[str] = (),
    ) -> np.ndarray:  # fmt: skip
        schema = self.folder.schema
        columns, num_rows = columns_of_values(
            rows, features, schema.doc, self.folder.tokenizer, schema.event_inputs, request
        )
        if num_rows == 0:
            return np.zeros((0, self.folder.index_width), np.float32)
        model = self.folder.model
        return encode_columns(features, columns, partial(encode, model), device=device_of(model)).numpy()


@checked
def load_model(folder: str | Path, device: str = "auto") -> Model:
    """Load a model folder such as RUN/sft/best to a device: auto, cpu or cuda[:INDEX].

    Raises CheckpointError: missing or damaged; ConfigError: no such device.
    """
    return Model(load_model_folder(Path(folder), find_device(device)))


@checked
def from_pretrained(repo_id: str, revision: str | None = None) -> Model:
    """Load a model from the Hugging Face Hub (OWNER/NAME). Raises CheckpointError: missing or damaged."""
    return load_model(fetch_from_hub(repo_id, revision))
