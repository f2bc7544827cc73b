"""Refresh every few steps: hard negatives, contents of items.

Mined files are in the stage's folder, one per set of training partitions and mining step. A resume reads the file of
the last mining step before the checkpoint, since the checkpoint's weights would mine others; a missing file is mined
again only if the checkpoint is of the mining step.

Shapes: N documents of the catalogue, D of vectors.
"""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from torch import Tensor

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import CHECKPOINTS, checkpoints_in
from bigdssm.config import Config, StageConfig, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import Rows
from bigdssm.errors import CheckpointError
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import DocumentVectors, encode_catalogue, item_contents, tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, UniformNegatives
from bigdssm.retrieval.mining import gather_hard_negatives, mine
from bigdssm.retrieval.shards import Share
from bigdssm.training.batches import FixedDocuments, row_stream
from bigdssm.training.engine import Engine
from bigdssm.training.process_group import device
from bigdssm.training.start import segment_steps
from bigdssm.utils import timing
from bigdssm.utils.device import RandomState
from bigdssm.utils.hashing import hash64
from bigdssm.utils.log import Progress, get_logger

logger = get_logger(__name__)
CONTENTS_PER_EPOCH = 10  # how often the contents of items are computed, by default


@dataclass(frozen=True)
class HardNegativeRefresh:
    """Loads or mines the hard negatives of a stage. Steps are counted from the start of the current segment."""

    config: Config
    name: StageName
    engine: Engine
    dataset: Dataset
    progress: Progress
    documents: FixedDocuments | None = None

    def load(self, step: int, resumed: bool) -> tuple[HardNegatives | UniformNegatives | None, DocumentVectors | None]:
        """Return the hard negatives of `step`, and this rank's index vectors if mining encoded them; or None.

        All ranks must call it. A mined file is read only if the segment is `resumed`: an older one may be of another
        dataset. Raises CheckpointError: the file of a resumed segment is missing.
        """
        stage = self.config.stage(self.name)
        if stage.negatives.hard == 0:
            return None, None
        if stage.negatives.mining.uniform:
            return UniformNegatives(self._negative_documents), None
        mining_step = self._mining_step(step)
        file = stage.negatives.mining.file
        path = self.path(mining_step) if file is None else Path(file)
        if (resumed or file is not None) and distributed.broadcast_object(path.exists()):
            hard = HardNegatives.open(path)
            if file is None:  # the config's file was checked at the start
                hard.check_against(self.dataset)
            return hard, None
        if resumed and (step != mining_step or self._every_steps == 0):
            raise CheckpointError(
                f"{path} is missing: the run was trained with these negatives, and its current weights would mine "
                "others; restore the file, or start again in another run.dir"
            )
        return self._mine(mining_step)

    def refresh(self, step: int, segment_start_step: int) -> HardNegatives:
        """Mine by the current weights for the steps from the segment's `step` on. All ranks must call it.

        Removes the files that no checkpoint needs. segment_start_step: the run's step at the start of the segment.
        """
        with RandomState.now().replayed():  # a resumed run, which does not mine, has the same random states
            hard, _ = self._mine(step)
        if distributed.is_main():
            folder = self.config.stage_dir(self.name)
            saved = [int(path.name.removeprefix("step-")) for path in checkpoints_in(folder / CHECKPOINTS)]
            oldest_saved = min(saved, default=segment_start_step + step) - segment_start_step
            oldest = self._mining_step(max(0, oldest_saved))
            for old in range(0, oldest, self._every_steps):
                self.path(old).unlink(missing_ok=True)
        return hard

    def steps_to_refresh(self, step: int) -> int:
        """Return the number of steps from `step` until hard negatives are mined again."""
        again = self._every_steps > 0 and self.config.stage(self.name).negatives.hard > 0
        return self._mining_step(step) + self._every_steps - step if again else sys.maxsize

    def path(self, step: int) -> Path:
        """Return the file mined at `step` for the training partitions."""
        config, partitions = self.config, ""
        if config.data.from_partition is not None or config.data.mixture:
            mixture = [(source.name, source.weight) for source in self.dataset.sources]
            fingerprint = hash64(repr([mixture, "mixed", self.dataset.rows_fingerprint])) % 2**64
            partitions = f".{fingerprint:016x}"
        mining_step = f".step-{step:08d}" if self._every_steps else ""
        return config.stage_dir(self.name) / f"mined_negatives{partitions}{mining_step}.npy"

    @property
    def _negative_documents(self) -> NegativeDocuments:
        return NegativeDocuments.of(self.dataset, self.config.model.tables.id_dropout)

    @property
    def _every_steps(self) -> int:
        return self.config.stage(self.name).negatives.mining.every_steps

    def _mining_step(self, step: int) -> int:
        return step // self._every_steps * self._every_steps if self._every_steps else 0

    def _mine(self, step: int) -> tuple[HardNegatives, DocumentVectors]:
        """Mine for the rows of the steps from `step` until the next mining, or to the end of the stage."""
        config, stage, mining = self.config, self.config.stage(self.name), self.config.stage(self.name).negatives.mining
        share = Share(distributed.rank(), distributed.world_size(), progress=self.progress)
        encoders = tower_encoders(self.engine.deepspeed, self.dataset, device())
        if self.documents is None:
            documents = encode_catalogue(encoders, self.dataset.catalogue, share)
        else:
            documents = self.documents.share(device(), self.dataset.catalogue.withdrawn)
        with closing(row_stream(config, stage, self.dataset, share.rank, share.world_size)) as stream:
            # no fewer at the end of the stage: a resumed one may be longer
            steps = self._every_steps or segment_steps(stage, stream.steps_per_epoch)
            is_partial = steps < stream.steps_per_epoch
            stream.step = step
            rows = f"the rows of {steps} steps" if is_partial else "every train row"

            def next_rows() -> Iterator[Rows]:
                for number, batch in enumerate(islice(stream, steps), start=1):
                    yield batch
                    self.progress("steps mined for", number, steps)
                stream.check()  # fail rather than leave unreadable rows out of the file

            logger.info("mining negatives at ranks %d to %d of %s", mining.first, mining.last, rows)
            local = mine(
                encoders, self.dataset, next_rows() if is_partial else None,
                first=mining.first, last=mining.last, margin=mining.margin, exact_up_to=mining.exact_up_to,
                documents=documents, share=share, exclude_seen=config.data.exclude_seen,
                negatives=self._negative_documents,
            )  # fmt: skip
        return gather_hard_negatives(self.path(step), local, self.dataset), documents


class ItemContents:
    """Contents [1 + N, D] of all items, which histories read, equal on every rank.

    They are computed again every few steps. All ranks must call each of the methods.
    """

    NAME = "item_contents"  # in checkpoints

    def __init__(self, engine: Engine, dataset: Dataset, every_steps: int) -> None:
        self._engine = engine
        self._dataset = dataset
        self._every = every_steps
        self._table: Tensor | None = None  # None before the first step

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contents; nothing before the first step."""
        return {} if self._table is None else {self.NAME: self._table}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the contents of a checkpoint, of any number of ranks."""
        if self.NAME in state:
            self._table = state[self.NAME].to(device())

    def use(self, step: int) -> None:
        """Set the contents of a step in the model, which validations replace; compute them first if it is due."""
        if self._table is None or step % self._every == 0:
            with timing.span("contents of items"):
                self._table = item_contents(self._engine.deepspeed, self._dataset, device())
        cast(DualEncoder, self._engine.module).set_contents(self._table)


def contents_period(stage: StageConfig, steps_per_epoch: int) -> int:
    """Return the number of steps between computations of the contents of items.

    The first contents are those of the initial weights: a stage shorter than an epoch computes them as often as an
    epoch does.
    """
    steps = min(steps_per_epoch, segment_steps(stage, steps_per_epoch))
    return stage.refresh_contents_every_steps or max(1, steps // CONTENTS_PER_EPOCH)
