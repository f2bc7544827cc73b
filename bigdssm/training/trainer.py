"""The trainer of a stage: its components, built from the config, and their state."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import asdict
from functools import partial
from math import isfinite
from typing import Any

import torch

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import TRAINED_CODES, TensorReader
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cli import ProgressBar
from bigdssm.cluster.faults import Faults
from bigdssm.cluster.metrics import Trackers, metric_label
from bigdssm.cluster.monitor import SpikeAlert
from bigdssm.cluster.run_folder import CONSUMED, SKIPPED, RowLog, versions
from bigdssm.cluster.signals import StopRequest
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.config import Config, FrequencyCorrection, StageName
from bigdssm.errors import Preempted
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.loader.batch import Batch
from bigdssm.loader.row_stream import RowStream
from bigdssm.models import DualEncoder
from bigdssm.models.precision import saved_precision, settle_precision
from bigdssm.tables.files import MappedTables, load_tables
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.encoding import RandomState
from bigdssm.training.engine import Engine, device
from bigdssm.training.fixed_documents import FixedDocuments
from bigdssm.training.health import Health
from bigdssm.training.negative_refresh import HardNegativeRefresh
from bigdssm.training.objective import Objective
from bigdssm.training.optimizers import schedule_factor, warmup_steps
from bigdssm.training.portable import frozen_checksum, set_weights
from bigdssm.training.resume import StartPoint, segment_steps
from bigdssm.training.table_rows import build_tables
from bigdssm.training.validation import BestSelection, Validator, WeightAverage
from bigdssm.training.warm_start import initialize_item_embeddings
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)


class Trainer:
    """Model, engine, data, loss and progress of a stage on this rank; `loop.train` runs it.

    `state_dict` returns the complete training state. A resumed stage restores it in this order: precision, before the
    engine is built; weights, before the engine copies them; hard negatives, before the first batch; and in
    `load_state_dict` optimizer, loss, weight average, random states, position in the stream.
    """

    def __init__(
        self, config: Config, name: StageName, model: DualEncoder, stream: RowStream, start: StartPoint,
        documents: FixedDocuments | None = None, *,
        store: CheckpointStore, trackers: Trackers, bar: ProgressBar, watchdog: Watchdog, stop: StopRequest,
    ) -> None:  # fmt: skip
        """Build the stage and restore it to `start`. All ranks must call it.

        Raises CheckpointError: hard negatives of a resumed run are missing; Preempted: a stop is requested while they
        are mined.
        """
        self.name, self.stage, self.folder = name, config.stage(name), config.stage_dir(name)
        self.progress = start.progress
        self.stream, self.stream_step = stream, stream.step  # next step to consume; the stream reads ahead
        self.store, self.watchdog, self.stop, self.faults = store, watchdog, stop, Faults.from_environment()
        stage, progress, dataset = self.stage, self.progress, stream.dataset
        rank, world_size = distributed.rank(), distributed.world_size()

        how = settle_precision(config.engine, device().type, start.precision)
        self.async_checkpoints = how.async_checkpoints
        self._origin: dict[str, Any] = {
            "config": config.to_dict(), "versions": versions(), "run_id": start.run_id, "stage": name,
            "precision": saved_precision(config.engine, how),
        }  # fmt: skip
        read = start.reader(model)
        if read is not None:
            set_weights(model, read)
        else:
            model.tables.start_unknown(start.new_codes)
        if how.checkpoint_activations:
            model.checkpoint_activations()
        tables = build_tables(model, config, name, how.table_memory, resumed=read is not None)
        if read is None and stage.warm_start.window:
            initialize_item_embeddings(model, dataset.whole, stage.warm_start, tables)
        self.engine = Engine(model, how, stage.optimizer, max(1, stage.rows_global // world_size), tables)
        self._origin["frozen"] = start.check_frozen(frozen_checksum(model))
        if read is not None and tables is not None:  # before negatives are mined
            assert start.checkpoint is not None
            load_tables(tables, MappedTables(start.checkpoint.checkpoint.table_files(), tables.specs), states=True)
            tables.steps = progress.applied
        for table, codes in start.new_codes.items():
            if tables is not None and table in tables.stores and not tables.specs[table].hash_rows:
                unknown = tables.look_up(table, torch.tensor([OUT_OF_VOCABULARY]))
                tables.stores[table].initialize(codes, unknown.expand(len(codes), -1), tables.steps)
        counted = isinstance(stage.sampling, FrequencyCorrection) and stage.sampling.frequency == "counts"
        self.objective = Objective(
            stage, config.model, how.loss_tile, stream.doc_weights() if counted else None,
            stream.queries_per_step, self.engine.product_dtype, dataset.catalogue.num_candidates,
        )  # fmt: skip
        self.selection = BestSelection()
        self.average = WeightAverage(self.engine.module, stage.weight_average) if stage.weight_average else None

        self.mining = HardNegativeRefresh(config, name, self.engine, dataset, self.report_progress, documents)
        hard_negatives, initial_documents = self.mining.load(progress.step - progress.part_step, start.same_segment)
        sharded = model.tables.sharded
        self._make_batch = BatchBuilder(
            stream, stage, config.run.seed, hard_negatives, documents, sharded, config.model.tables.id_dropout
        )

        torch.manual_seed(config.run.seed * 1_000_003 + rank + 1)  # dropout differs between ranks
        if read is not None:
            self.load_state_dict(start, read)
        steps = segment_steps(stage, stream.steps_per_epoch)
        self.total_steps = progress.part_step + steps
        warmup = warmup_steps(steps, stage.optimizer)
        if warmup < stage.optimizer.warmup_steps and distributed.is_main():
            logger.warning(
                "%s.optimizer.warmup_steps=%d is more than half of the %d steps: warm-up takes %d of them",
                name, stage.optimizer.warmup_steps, steps, warmup,
            )  # fmt: skip

        self.validator = Validator(
            dataset,
            config,
            name,
            rows_per_chunk=1024,
            fixed=documents,
            keeps_frozen=start.same_segment,
            continues=progress.part_step > 0,
        )
        self.starts_trained = config.initial_model(name) is not None or progress.part_step > 0
        # this rank's index vectors, if mining has encoded them; not valid for a restored weight average
        self.initial_documents = None if self.average is not None and read is not None else initial_documents
        metric = stage.validation_metric
        self.health = Health(
            name, self.engine, trackers, bar, self.total_steps, stage.rows_global, stage.log_every_steps,
            lambda: f"best {metric_label(metric)} {progress.best:.4f}" if isfinite(progress.best) else "",
        )  # fmt: skip
        self.alert = SpikeAlert(self.folder, rank, world_size, progress.step)
        row_log = partial(RowLog, self.folder, rank=rank, world_size=world_size, next_step=progress.step)
        self.consumed_log = row_log(CONSUMED) if config.debug.log_row_ids else None
        self.skipped_log = row_log(SKIPPED)
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the complete training state, as arguments of `CheckpointStore.save`."""
        random = RandomState.now()
        return {
            "state": {
                "stream": self.stream.state(self.stream_step),
                "progress": asdict(self.progress),
                **self._origin,
            },
            "common": self.objective.state_dict()
            | ({} if self.average is None else self.average.state_dict())
            | self.selection.state_dict()
            | {TRAINED_CODES + n: torch.tensor(codes) for n, codes in self.stream.dataset.schema.trained.items()},
            "rank_state": {"cpu": random.cpu} | ({} if random.device is None else {"device": random.device}),
            "pieces": self.engine.local_pieces(),
            "tables": self.engine.tables,
        }

    def load_state_dict(self, start: StartPoint, read: TensorReader) -> None:
        """Restore the state of a checkpoint, read by `read`; the model's weights and tables are set already.

        All ranks must call it. Not restored: the stream's position in a new segment; random states (dropout) at another
        world size.
        """
        assert start.checkpoint is not None
        self.engine.restore(read, start.progress.applied)
        common = start.checkpoint.common_tensors()
        self.objective.load_state_dict(common)
        if self.average is not None and not start.new_codes:
            self.average.load_state_dict(common)
        if (random := start.checkpoint.rank_state) is not None:
            RandomState(random["cpu"], random.get("device")).restore()
        if start.same_segment:
            self.selection.load_state_dict(common)
            self.stream.step = self.stream_step = start.checkpoint.state["stream"]["step"]
        logger.info("%s continues from %s", self.name, start.describe(self.stream.dataset))

    def batches(self, num: int) -> Generator[Batch]:
        """Yield the next `num` batches on this rank's device."""
        return read_batches(self.stream, self._make_batch, device(), num)

    def refresh_hard_negatives(self) -> None:
        """Mine hard negatives for the next steps by the current weights. All ranks must call it."""
        self.store.wait()  # a checkpoint in progress needs the current file
        step, part_step = self.progress.step, self.progress.part_step
        with self.health.timed("mining"):
            self._make_batch.hard_negatives = self.mining.refresh(step - part_step, part_step)

    def steps_to_refresh(self) -> int:
        """Return the number of steps until the stage ends or hard negatives are mined again."""
        until_mined = self.mining.steps_to_refresh(self.progress.step - self.progress.part_step)
        return min(self.total_steps - self.progress.step, until_mined)

    def lr_factor(self) -> float:
        """Return the learning rate of the next step, relative to the peak; the schedule counts applied steps."""
        applied = self.progress.applied - self.progress.part_applied
        return schedule_factor(applied, self.total_steps - self.progress.part_step, self.stage.optimizer)

    def report_progress(self, task: str, done: int, total: int | None) -> None:
        """Report progress of long work between steps to the watchdog. All ranks must call it.

        Raises Preempted on a requested stop.
        """
        self.watchdog.beat(f"{task}: {done} of {total}")
        if self.stop.any_rank_requested():
            raise Preempted(f"stopped on request while {task}; continue with --resume auto")

    def is_over(self) -> bool:
        """Return True if all steps are taken, or patience is exhausted."""
        patience = self.stage.patience
        out_of_patience = patience > 0 and self.progress.validations_since_best >= patience
        return out_of_patience or self.progress.step >= self.total_steps

    def is_save_due(self) -> bool:
        """Return True if, on this rank, the last checkpoint is older than the config allows."""
        every_s = 60.0 * self.stage.save_every_minutes
        return every_s > 0 and time.monotonic() - self.saved_at >= every_s
