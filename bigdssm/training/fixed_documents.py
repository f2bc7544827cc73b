"""Document vectors of a trained model, against which a stage trains the query tower alone.

The trained model has that model's document tower, so its queries can be searched in existing indexes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bigdssm import distributed
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import Config, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.models import DualEncoder
from bigdssm.models.encoders.text import text_configs
from bigdssm.retrieval.embed import DocumentVectors, Share
from bigdssm.retrieval.vectors import CodedVectors, open_vectors
from bigdssm.training.checks import model_difference


@dataclass(frozen=True)
class FixedDocuments:
    """The index vectors of all documents, by catalogue row, and the checksum of their model."""

    vectors: CodedVectors
    checksum: str

    def share(self, device: torch.device, withdrawn: np.ndarray) -> DocumentVectors:
        """Return this rank's share of the vectors, as `encode_catalogue` does."""
        first, last = Share(distributed.rank(), distributed.world_size()).of(len(self.vectors))
        return DocumentVectors(torch.from_numpy(np.array(self.vectors[first:last])).to(device), first, withdrawn)


def fix_documents(model: DualEncoder, config: Config, name: StageName, dataset: Dataset) -> FixedDocuments | None:
    """Copy and freeze the document tower of a stage that does not train it, and open its vectors; else return None.

    Raises CheckpointError: `documents.model` is no model of this dataset, or the vectors are of another model or
    dataset; ConfigError: its document tower differs from the one in `config`.
    """
    documents = config.stage(name).documents
    if documents.model is None or documents.vectors is None:
        return None
    source = load_model_folder(Path(documents.model))
    source.view(dataset)
    trained = source.config
    if shared := text_configs(trained.model, source.schema).get("shared"):  # by default that of the queries
        trained = replace(trained, model=replace(trained.model, doc=replace(trained.model.doc, text=shared)))
    if difference := model_difference(trained, config, omitted=("query", "share_text")):
        raise ConfigError(f"{documents.model} was trained with another model section: {difference}; use the same here")
    model.freeze_documents(source.model.state_dict())
    vectors = open_vectors(Path(documents.vectors), source.doc_checksum, dataset.whole, source.index_width)
    return FixedDocuments(vectors, source.doc_checksum)
