"""Three real steps of a stage: their memory and rate, with the estimate."""

from dataclasses import replace
from pathlib import Path
from statistics import median

from bigdssm import distributed
from bigdssm.cluster.launcher import LauncherMonitor
from bigdssm.cluster.metrics import read_stage
from bigdssm.cluster.signals import StopRequest
from bigdssm.config import Config, StageName
from bigdssm.dataset.dataset import open_dataset
from bigdssm.training.estimate import estimate, size_text
from bigdssm.training.stages import run_stage
from bigdssm.utils import atomic
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)
PROBE_STEPS = 3
PROBE_DIR = "probe"  # in run.dir, while a probe runs


def probe_stage(
    config: Config, name: StageName, *, world_size: int,
    launcher: LauncherMonitor | None = None, stop: StopRequest | None = None,
) -> None:  # fmt: skip
    """Take three steps of a stage in a temporary run folder; log their peak memory, their rate, and the estimate.

    All ranks must call it, within `stage_lock`. The memory is that of rank 0.
    """
    run_dir = Path(config.run.dir) / PROBE_DIR
    source = config.initial_model(name)
    stage = replace(
        config.stage(name),
        init=None if source is None else str(source),
        steps=PROBE_STEPS,
        validate_every_steps=0,
        save_every_steps=0,
        save_every_minutes=0.0,
        log_every_steps=1,
    )
    run = replace(config.run, dir=str(run_dir), trackers=())
    probed = replace(config, run=run, pretrain=stage) if name == "pretrain" else replace(config, run=run, sft=stage)
    try:
        run_stage(
            probed, name, resume=False, validate_only=False, world_size=world_size, launcher=launcher, stop=stop,
            probe=True,
        )  # fmt: skip
        estimated = estimate(config, name, open_dataset(config.data), world_size)  # a collective
        if not distributed.is_main():
            return
        records = read_stage(probed.stage_dir(name))
    finally:
        if distributed.is_main():
            atomic.remove(run_dir)
    rates = [record["rows_per_s"] for record in records[1:]]  # the first step allocates and compiles
    memory = f"{size_text(records[-1]['memory_gb'] * 2**30)} of the process"
    if "gpu_memory_gb" in records[-1]:
        memory += f", {size_text(records[-1]['gpu_memory_gb'] * 2**30)} of the device"
    lines = [
        f"measured in {PROBE_STEPS} steps: {median(rates):,.0f} rows per second after the first step",
        f"measured peak memory of rank 0: {memory}",
        *estimated.lines(median(rates)),
    ]
    logger.info("%s, probe:\n    %s", name, "\n    ".join(lines))
