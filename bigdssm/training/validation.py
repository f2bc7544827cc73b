"""Full-catalogue validation during training, the moving average of weights, the best/ model folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.checkpoints.model_folder import (
    FROZEN_FILE,
    holds_weights,
    is_model_folder,
    keep_model_folder,
    read_model_meta,
    save_model_folder,
)
from bigdssm.checkpoints.training_record import TRAINED, TrainingRecord
from bigdssm.config import Config, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.evaluation.evaluate import Evaluation, evaluate_split
from bigdssm.evaluation.metrics import means, row_metrics, standard_errors
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import DocumentVectors, tower_encoders
from bigdssm.tables.files import row_file, store_sources, write_row_file
from bigdssm.training.batches import FixedDocuments
from bigdssm.training.engine import Engine, trained_weights
from bigdssm.training.process_group import device
from bigdssm.training.start import StageProgress
from bigdssm.utils import timing
from bigdssm.utils.atomic import recover, remove
from bigdssm.utils.log import Progress, get_logger, metric_label

logger = get_logger(__name__)
SPLIT = "validation"
_SELECTION, _PREFIX = "selection.", "average."


class Validator:
    """Evaluates an engine's model on the validation split, and writes the best/ model folder."""

    def __init__(
        self, dataset: Dataset, config: Config, stage: StageName, rows_per_chunk: int,
        fixed: FixedDocuments | None = None, keeps_frozen: bool = False, continues: bool = False,
        earlier: TrainingRecord | None = None, trained: TrainingRecord | None = None,
    ) -> None:  # fmt: skip
        """keeps_frozen: the file of frozen weights in best/ is of this segment.

        earlier, trained: the data of the initial weights, and of those of this segment in addition.

        continues: the segment continues on newer partitions. It validates on the newest partition with validation rows;
        if this is older than the newest training data, `decides` is False: its rows would favour the old weights.
        """
        self._dataset, self._config, self._rows_per_chunk, self._fixed = dataset, config, rows_per_chunk, fixed
        self._keeps_frozen = keeps_frozen
        self._earlier, self._trained = earlier, trained
        self._best_dir, self._stage = config.stage_dir(stage) / "best", config.stage(stage)
        self._validation = dataset.newest_part(SPLIT) if continues else dataset
        self.decides = max(p.number for p in self._validation.partitions) >= max(p.number for p in dataset.partitions)

    def evaluate(
        self, engine: Engine, progress: Progress, documents: DocumentVectors | None = None
    ) -> Evaluation | None:
        """Evaluate; None if the dataset has no validation rows. All ranks must call it.

        documents: this rank's share of the index vectors, if already computed.
        """
        if self._validation.num_rows(SPLIT) == 0:
            return None
        if self._fixed is not None:
            documents = self._fixed.share(device(), self._dataset.catalogue.withdrawn)

        with timing.span("validation"):
            return evaluate_split(
                tower_encoders(engine.deepspeed, self._dataset, device()),
                self._validation,
                SPLIT,
                documents=documents,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                rows_per_chunk=self._rows_per_chunk,
                exclude_seen=self._config.data.exclude_seen,
                progress=progress,
            )

    @property
    def num_queries(self) -> int:
        """Return the number of queries that validations select by, 0 if they do not."""
        return self._validation.num_queries(SPLIT) if self.decides else 0

    def partition_names(self) -> str:
        """Return the names of the validated partitions, for messages."""
        return ", ".join(partition.name for partition in self._validation.partitions)

    def describe(self, progress: StageProgress, metric: str, *, keeps_start: bool = False) -> str:
        """Format the weights in best/, the rows that they were validated on, and the values that were compared.

        keeps_start: best/ has the trained weights that the segment started from.
        """
        best = f"{progress.describe_best(metric, decides=self.decides)} at step {progress.best_step}"
        if keeps_start:
            best = f"the initial weights are the best, unchanged: {best}"
        at_start = [entry for entry in progress.history if entry["step"] == progress.segment_start_step]
        # the last one: an earlier segment may have ended with a validation at this step
        segment = at_start[-1:] + [entry for entry in progress.history if entry["step"] > progress.segment_start_step]
        if not segment or not self._validation.num_rows(SPLIT):
            return best
        data = f"validated on {self._validation.num_queries(SPLIT):,} queries of {self.partition_names()}"
        if not self.decides:
            data += ", which are older than the newest training data and select nothing"
        if segment[0]["step"] == progress.segment_start_step < segment[-1]["step"]:
            data += (
                f" ({metric_label(metric)} {segment[0][metric]:.4f} at the start, {segment[-1][metric]:.4f} at the end)"
            )
        return f"{best}, {data}"

    def is_best_missing(self) -> bool:
        """Return True, on every rank, if best/ is missing and cannot be recovered.

        All ranks must call it.
        """
        if distributed.is_main():
            recover(self._best_dir)
        return distributed.broadcast_object(not is_model_folder(self._best_dir))

    def save_best(self, engine: Engine, provenance: dict[str, Any], *, retained: Path | None = None) -> None:
        """Write the current weights to the best/ folder. All ranks must call it.

        retained: a model folder with exactly these weights: best/ gets its files, and has its checksum. Raises
        CheckpointError: they cannot be written; the previous folder is kept.
        """
        record = self._earlier if provenance.get("initial") else self._trained
        provenance = {**provenance, "queries": self.num_queries}
        if record is not None:
            provenance[TRAINED] = record.as_json()
        with timing.span("model folder"):
            if retained is not None:
                self._keep(retained, provenance)
                return
            model, frozen = cast(DualEncoder, engine.module), self._best_dir / FROZEN_FILE
            frozen_weights = model.frozen_weights()
            is_written = distributed.broadcast_object(self._keeps_frozen and holds_weights(frozen, frozen_weights))
            names = {name for name, _ in model.named_parameters() if not (is_written and name in frozen_weights)}
            state = engine.state_dict(names, on_main=True)
            fixed = {} if self._fixed is None else {"documents": self._fixed.checksum}
            error: BigDSSMError | None = None
            tables = None
            if (sharded := engine.tables) is not None:  # each rank writes its rows, before rank 0 writes the rest
                tables = self._best_dir.with_name(".tables.unfinished")
                try:
                    if distributed.is_main():
                        remove(tables)
                        tables.mkdir(parents=True)
                except OSError as problem:
                    error = CheckpointError(f"could not write {tables}: {problem}; the previous model is kept")
                distributed.raise_together(error)
                try:
                    write_row_file(tables / row_file(distributed.rank()), store_sources(sharded))
                except (OSError, SafetensorError) as problem:
                    error = CheckpointError(f"could not write {tables}: {problem}; the previous model is kept")
                distributed.raise_together(error)
            if distributed.is_main():
                try:
                    save_model_folder(
                        self._best_dir, model, self._config, self._dataset.schema, self._dataset.tokenizer_dir,
                        {**provenance, "dataset": self._dataset.fingerprint, **fixed},
                        state=state, frozen=frozen if is_written else None, tables=tables,
                    )  # fmt: skip
                except BigDSSMError as problem:
                    error = problem
                except OSError as problem:
                    error = CheckpointError(f"could not write {self._best_dir}: {problem}; the previous one is kept")
            distributed.raise_together(error)
            self._keeps_frozen = True

    def _keep(self, source: Path, provenance: dict[str, Any]) -> None:
        error: BigDSSMError | None = None
        if distributed.is_main():
            try:
                own = read_model_meta(source)["provenance"]
                shared = {name: own[name] for name in ("dataset", "documents") if name in own}
                keep_model_folder(source, self._best_dir, self._config, {**provenance, **shared})
            except BigDSSMError as problem:
                error = problem
            except OSError as problem:
                error = CheckpointError(f"could not write {self._best_dir}: {problem}; the previous one is kept")
        distributed.raise_together(error)


class BestSelection:
    """Decides which validation's weights best/ holds, so that noise alone decides nothing.

    Among a stage's own validations it is the latest within one standard error of the highest. A stage that starts from
    trained weights keeps these until a validation exceeds theirs by more than one standard error. Errors are those of
    the paired differences of rows, clustered by query.
    """

    def __init__(self) -> None:
        self._start: np.ndarray | None = None  # float64 [rows with a rank], the metric of the initial weights
        self._highest: np.ndarray | None = None  # of the validation with the highest mean

    def add(self, evaluation: Evaluation, metric: str, *, of_start: bool) -> tuple[bool, bool]:
        """Add the next validation; return whether best/ takes its weights, and whether its mean is the highest."""
        values = row_metrics(evaluation.ranks)[metric]
        query_ids = evaluation.query_ids[~np.isnan(evaluation.ranks)]
        if self._highest is not None and len(self._highest) != len(values):
            logger.warning("validation has %d rows, and had %d; the selection of best/ starts again",
                           len(values), len(self._highest))  # fmt: skip
            self._start = self._highest = None
        if of_start:
            self._start = values
        if self._highest is None:
            self._highest = values
            return True, True
        gain, error = _paired(values, self._highest, query_ids)
        is_highest, is_taken = gain > 0, gain >= -error
        if is_highest:
            self._highest = values
        if self._start is not None:
            gain, error = _paired(values, self._start, query_ids)
            is_taken = is_taken and gain > error
        return is_taken, is_highest

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint; the same on every rank."""
        state = {_SELECTION + "start": self._start, _SELECTION + "highest": self._highest}
        return {name: torch.from_numpy(values) for name, values in state.items() if values is not None}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors of a checkpoint."""
        start, highest = (state.get(_SELECTION + name) for name in ("start", "highest"))
        self._start = None if start is None else start.numpy()
        self._highest = None if highest is None else highest.numpy()


def _paired(a: np.ndarray, b: np.ndarray, query_ids: np.ndarray) -> tuple[float, float]:
    """Return the mean of a − b and its standard error, 0 below two queries."""
    difference = {"gain": a - b}
    return means(difference)["gain"], float(np.nan_to_num(standard_errors(difference, query_ids)["gain"]))


class WeightAverage:
    """The exponential moving average of a module's trained weights, in float32, complete on every rank.

    The decay increases from 0.1 to the configured one, so that initial weights decay fast. Source: Polyak and Juditsky
    1992; Tarvainen and Valpola 2017 for the exponential average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay, self.num_updates = module, decay, 0
        self._average = {name: weight.detach().float().clone() for name, weight in trained_weights(module)}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights."""
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, weight in trained_weights(self._module):
            self._average[name].lerp_(weight.float(), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """A context in which the average replaces the module's weights."""
        weights = {name: weight.detach().clone() for name, weight in trained_weights(self._module)}
        try:
            for name, weight in trained_weights(self._module):
                weight.copy_(self._average[name])
            yield
        finally:
            for name, weight in trained_weights(self._module):
                weight.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint; the same on every rank."""
        average = {_PREFIX + name: tensor.cpu() for name, tensor in self._average.items()}
        return {_PREFIX + "updates": torch.tensor([self.num_updates]), **average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a checkpoint's state. If the module has grown since, the average starts again."""
        saved = {name: state[_PREFIX + name] for name in self._average}
        if all(saved[name].shape == tensor.shape for name, tensor in self._average.items()):
            for name, tensor in self._average.items():
                tensor.copy_(saved[name])
            self.num_updates = int(state[_PREFIX + "updates"])
