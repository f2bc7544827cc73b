"""Run a stage: pretraining, or fine-tuning (SFT) from its result."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import CHECKPOINTS
from bigdssm.checkpoints.store import CheckpointStore
from bigdssm.cluster.faults import Faults
from bigdssm.cluster.launcher import LauncherMonitor
from bigdssm.cluster.metrics import CONFIG_FILE, Trackers
from bigdssm.cluster.run_folder import STOP_FILE, FolderLock, record_start
from bigdssm.cluster.signals import StopRequest
from bigdssm.cluster.watchdog import Watchdog
from bigdssm.config import Config, StageName
from bigdssm.errors import ConfigError
from bigdssm.training.batches import BatchBuilder, read_batches, row_stream
from bigdssm.training.checks import check_agreement, check_stage, check_tables
from bigdssm.training.deepspeed_patches import undo_patches
from bigdssm.training.engine import device, init_process_group
from bigdssm.training.fixed_documents import fix_documents
from bigdssm.training.resume import StageProgress, check_folder, find_start, limit_ids, segment_steps
from bigdssm.training.setup import build_model, build_trainer
from bigdssm.utils import atomic
from bigdssm.utils.log import get_logger
from bigdssm.utils.progress import ProgressBar

logger = get_logger(__name__)
_training = threading.Lock()


@contextmanager
def stage_lock() -> Iterator[None]:
    """A lock for one stage per process, since random states, process group and thread counts are global.

    Raises ConfigError: another thread is training.
    """
    if not _training.acquire(blocking=False):
        raise ConfigError(
            "a stage is training in this process, needs none: random states and the process group are shared by all "
            "threads; train one stage after the other, or each in a separate process (bigdssm pretrain)"
        )
    try:
        yield
    finally:
        _training.release()


@contextmanager
def _training_state() -> Iterator[None]:
    """Set autocast, gradients and default dtype to the state of a new process; restore all that a stage changes.

    A notebook may call a stage within `torch.autocast`, `torch.no_grad` or `torch.inference_mode`.
    """
    linear, dtype = torch.nn.functional.linear, torch.get_default_dtype()
    autocast = {kind: torch.is_autocast_enabled(kind) for kind in {"cpu", device().type}}
    depth = torch.autocast_increment_nesting() - 1
    try:
        torch.set_default_dtype(torch.float32)
        for kind in autocast:
            torch.set_autocast_enabled(kind, False)
        # Weights that are cast within DeepSpeed's own autocast are discarded at the end of an outermost context only.
        for _ in range(depth + 1):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        with torch.inference_mode(False):  # which enables gradients, too
            yield
    finally:
        undo_patches()  # also after a failure, when the engine is not destroyed
        torch.nn.functional.linear = linear  # DeepSpeed replaces it at ZeRO stage 3
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind, enabled in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
        torch.set_default_dtype(dtype)


def run_stage(
    config: Config, name: StageName, *, resume: bool, validate_only: bool, world_size: int,
    launcher: LauncherMonitor | None = None, stop: StopRequest | None = None,
) -> StageProgress | None:  # fmt: skip
    """Check, build and train one stage on this rank, within `stage_lock`; return its final progress.

    validate_only: stop after the first batch was built, and return None.
    """
    dataset = check_stage(config, name, world_size, resume)
    reads_contents = config.model.query.history.items != "id"
    dataset = dataset.with_rules(replace(dataset.rules, item_rows=reads_contents))
    if not validate_only:
        check_folder(config, name, resume)
    stage_config, folder = config.stage(name), config.stage_dir(name)
    stop = stop or StopRequest()
    init_process_group()
    lock = FolderLock(folder)
    with ExitStack() as after:  # closed after the watchdog: trackers may take long to upload
        after.enter_context(_training_state())
        watchdog = Watchdog(
            config.engine.peer_timeout_s, launcher or LauncherMonitor(), folder / STOP_FILE, lock.end, stop.request
        )
        with watchdog:
            stop.on_early_exit = watchdog.leave
            check_agreement(config, dataset)
            torch.manual_seed(config.run.seed)
            model, initial = build_model(config, name, dataset, resume)
            check_tables(config, name, model)
            documents = fix_documents(model, config, name, dataset)
            stream = row_stream(
                config, stage_config, dataset, distributed.rank(), world_size, config.data.num_workers,
                quarantine=Path(config.run.dir) / f"quarantine-{distributed.rank():05d}.jsonl",
            )  # fmt: skip
            if validate_only:
                builder = BatchBuilder(
                    stream, stage_config, config.run.seed, documents=documents, tables=model.tables.sharded
                )
                batch = next(read_batches(stream, builder, device()))
                parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
                logger.info(
                    "%s is valid: %s parameters, %d steps, a first batch of %d rows and %d documents on rank 0",
                    name, f"{parameters:,}", segment_steps(stage_config, stream.steps_per_epoch),
                    len(batch.query_ids), len(batch.doc_ids),
                )  # fmt: skip
                check_folder(config, name, resume)  # last, so that errors of the config are reported first
                return None
            after.enter_context(lock)
            store = after.enter_context(CheckpointStore(folder / CHECKPOINTS, stage_config.keep_checkpoints))
            start = limit_ids(stream, find_start(config, name, store, stream, resume), initial)
            if distributed.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                atomic.write_text(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
            distributed.barrier()
            done = start.progress
            trackers = Trackers(folder, config, done.step, len(done.history), cpu=device().type == "cpu")
            after.enter_context(closing(trackers))
            with ProgressBar(delay_s=0.0) as bar, closing(stream):
                trainer = build_trainer(
                    config, name, model, stream, start, documents,
                    store=store, trackers=trackers, bar=bar, watchdog=watchdog, stop=stop,
                )  # fmt: skip
                del start  # frees the checkpoint in memory
                Faults.from_environment().install(trainer)
                record_start(folder, done.step, trainer.total_steps)
                logger.info(
                    "%s: %s, %d steps of %d rows on %d rank%s, from step %d, in %s",
                    name, config.data.webdataset or f"{dataset.num_rows('train'):,} rows", trainer.total_steps,
                    stage_config.rows_global, world_size, "s" if world_size != 1 else "", done.step, folder,
                )  # fmt: skip
                stop.defer_signals()
                progress = trainer.train()
    logger.info("%s finished: %s", name, trainer.validator.describe(progress, stage_config.validation_metric))
    return progress
