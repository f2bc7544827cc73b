"""Hard negatives of a stage: read from a file, or mined by its initial weights and again every so many steps.

Mined files are in the stage's folder, one per training partitions and, with `mining.every_steps`, per step of mining.
A resume reads the file of the last such step before the checkpoint, since the checkpoint's weights would mine others;
a lost file is mined again only where the checkpoint is of that very step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import CHECKPOINTS, checkpoints_in
from bigdssm.config import Config, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import CheckpointError
from bigdssm.loader.row_stream import RowStream
from bigdssm.retrieval.embed import DocumentVectors, Share, encode_catalogue, tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, UniformNegatives
from bigdssm.retrieval.mining import gather_hard_negatives, mine
from bigdssm.training.batches import row_stream
from bigdssm.training.encoding import RandomState
from bigdssm.training.engine import Engine, device
from bigdssm.training.resume import part_steps
from bigdssm.utils.hashing import hash64
from bigdssm.utils.log import Progress, get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class HardNegativeRefresh:
    """Provides the hard negatives of a stage. Steps are counted from the beginning of the present part."""

    config: Config
    name: StageName
    engine: Engine
    dataset: Dataset
    progress: Progress

    def load(self, step: int, resumed: bool) -> tuple[HardNegatives | UniformNegatives | None, DocumentVectors | None]:
        """Return the hard negatives of `step`, None where the loss has none. A collective.

        Second, this rank's index vectors of the documents, where mining has just encoded them. A mined file is read
        only where a part is `resumed`: an older one may be of another dataset. Raises CheckpointError where it is lost.
        """
        stage = self.config.stage(self.name)
        if stage.negatives.hard == 0:
            return None, None
        if stage.negatives.mining.uniform:
            return UniformNegatives(self.dataset.catalogue.num_docs), None
        mined_at = self._mined_at(step)
        given = stage.negatives.mining.file
        path = self.path(mined_at) if given is None else Path(given)
        if (resumed or given is not None) and distributed.broadcast_object(path.exists()):
            mined = HardNegatives.open(path)
            if given is None:  # that of the config was checked at the start
                mined.check_against(self.dataset)
            return mined, None
        if resumed and (step != mined_at or self._every_steps == 0):
            raise CheckpointError(
                f"{path} is missing: the run was trained with these negatives, and by now its weights would mine "
                "others; bring the file back, or begin anew in another run.dir"
            )
        return self._mine(mined_at)

    def refresh(self, step: int, part_step: int) -> HardNegatives:
        """Mine by the present weights for the steps from `step` on. A collective.

        Removes the files that no checkpoint needs. part_step: the run's step at which the part began.
        """
        with RandomState.now().replayed():  # a resumed run goes on from what the checkpoint has
            mined, _ = self._mine(step)
        if distributed.is_main():
            kept = [int(path.name.removeprefix("step-")) for path in checkpoints_in(self._folder / CHECKPOINTS)]
            oldest = self._mined_at(max(0, min(kept, default=part_step + step) - part_step))
            for old in range(0, oldest, self._every_steps):
                self.path(old).unlink(missing_ok=True)
        return mined

    def steps_to_refresh(self, step: int) -> int:
        """Return the number of steps from `step` on until hard negatives are mined again."""
        again = self._every_steps > 0 and self.config.stage(self.name).negatives.hard > 0
        return self._mined_at(step) + self._every_steps - step if again else sys.maxsize

    def path(self, step: int) -> Path:
        """Return the file mined at `step` for the training partitions."""
        part = _part(self.config, self.dataset)
        at = f".step-{step:08d}" if self._every_steps else ""
        return self._folder / f"mined_negatives{part}{at}.npy"

    @property
    def _folder(self) -> Path:
        return self.config.stage_dir(self.name)

    @property
    def _every_steps(self) -> int:
        return self.config.stage(self.name).negatives.mining.every_steps

    def _mined_at(self, step: int) -> int:
        return step // self._every_steps * self._every_steps if self._every_steps else 0

    def _mine(self, step: int) -> tuple[HardNegatives, DocumentVectors]:
        """Mine for the rows of the steps from `step` until the next mining, or to the end of the stage."""
        config, stage, mining = self.config, self.config.stage(self.name), self.config.stage(self.name).negatives.mining
        share = Share(distributed.rank(), distributed.world_size(), progress=self.progress)
        encoders = tower_encoders(self.engine.deepspeed, self.dataset, device())
        documents = encode_catalogue(encoders, self.dataset.catalogue.num_docs, share)
        with closing(row_stream(config, stage, self.dataset, share.rank, share.world_size)) as stream:
            # not fewer at the stage's end: a resumed one may be longer
            steps = self._every_steps or part_steps(stage, stream.steps_per_epoch)
            some = steps < stream.steps_per_epoch
            stream.step = step
            which = f"the {steps} steps' rows" if some else "every train row"
            logger.info("mining negatives at ranks %d to %d of %s", mining.first, mining.last, which)
            own = mine(
                encoders, self.dataset, self._to_come(stream, steps) if some else None,
                first=mining.first, last=mining.last, margin=mining.margin, exact_up_to=mining.exact_up_to,
                documents=documents, share=share, exclude_seen=config.data.exclude_seen,
            )  # fmt: skip
        return gather_hard_negatives(self.path(step), own, self.dataset), documents

    def _to_come(self, stream: RowStream, steps: int) -> Iterator[Rows]:
        """Yield this rank's rows of the next steps."""
        for step, rows in enumerate(islice(stream, steps), start=1):
            yield rows
            self.progress("steps mined for", step, steps)
        stream.check()  # rows that a rank could not read must not be missing from the file


def _part(config: Config, dataset: Dataset) -> str:
    """Return a fingerprint of the training partitions, empty for a whole dataset."""
    if config.data.from_partition is None and not config.data.mixture:
        return ""
    mixture = [(source.name, source.weight) for source in dataset.sources]
    part = hash64(repr([mixture, config.data.mixture_batches, dataset.fingerprint])) % 2**64
    return f".{part:016x}"
