"""Full-catalogue validation during training, and the best weights as a model folder."""

from __future__ import annotations

from typing import Any, cast

from bigdssm import distributed, timing
from bigdssm.artifacts.model_folder import is_model_folder, save_model_folder
from bigdssm.atomic import recover
from bigdssm.config import Config, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.evaluation.reranking import Reranking
from bigdssm.evaluation.scorer import encoders_of
from bigdssm.evaluation.split import Evaluation, evaluate_split
from bigdssm.models import DualEncoder
from bigdssm.progress import Progress
from bigdssm.retrieval.embed import Documents
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.training.engine import Engine, device

SPLIT = "validation"


class Validator:
    """Evaluates an engine's model on the validation split, and keeps a model folder."""

    def __init__(self, dataset: Dataset, config: Config, stage: StageName, rows_per_chunk: int) -> None:
        self._dataset, self._config, self._rows_per_chunk = dataset, config, rows_per_chunk
        self._best_dir, self._stage = config.stage_dir(stage) / "best", config.stage(stage)

    def evaluate(self, engine: Engine, progress: Progress, documents: Documents | None = None) -> Evaluation | None:
        """Return the evaluation, or None where the dataset has no validation rows. A collective.

        `documents` are the rank's share of the index vectors, which then need not be made again.
        """
        if self._dataset.num_rows(SPLIT) == 0:
            return None
        rerank = None
        if self._stage.loss.cross_encoder:
            dataset, catalogue = self._dataset, self._dataset.catalogue
            scorer = PairScorer(engine.deepspeed, dataset.schema, dataset.pad_token_id, catalogue.columns, device())
            rerank = Reranking(scorer, self._stage.rerank)
        with timing.span("validation"):
            return evaluate_split(
                encoders_of(engine.deepspeed, self._dataset, device(), engine.state_dict),
                self._dataset,
                SPLIT,
                documents=documents,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                rows_per_chunk=self._rows_per_chunk,
                filter_seen=self._config.data.excludes_seen,
                rerank=rerank,
                progress=progress,
            )

    def has_lost_best(self) -> bool:
        """Return True on every rank where there is no best/ folder, nor one that a kill left aside. A collective."""
        if distributed.is_main():
            recover(self._best_dir)
        return distributed.broadcast_object(not is_model_folder(self._best_dir))

    def keep(self, engine: Engine, provenance: dict[str, Any]) -> None:
        """Write the present weights to the best/ folder. A collective.

        Raises CheckpointError where they cannot be written; the folder of before stays.
        """
        with timing.span("model folder"):
            state = engine.state_dict()
            error: BigDSSMError | None = None
            if distributed.is_main():
                try:
                    save_model_folder(
                        self._best_dir,
                        cast(DualEncoder, engine.module),
                        self._config,
                        self._dataset.schema,
                        self._dataset.tokenizer_dir,
                        {**provenance, "dataset": self._dataset.fingerprint},
                        state=state,
                    )
                except BigDSSMError as problem:
                    error = problem
                except OSError as problem:
                    error = CheckpointError(f"could not write {self._best_dir}: {problem}; what it held before stays")
            distributed.raise_together(error)
