"""Command line of both stages, `bigdssm STAGE --config F [key=value …]`: starts the ranks, or runs as a rank."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from bigdssm.cli import at_least, command_parser, option, run_main
from bigdssm.cluster.launcher import LauncherMonitor, check_launch, is_rank, run_ranks, share_cores
from bigdssm.cluster.signals import StopRequest
from bigdssm.config import StageName, load_config
from bigdssm.errors import BigDSSMError, ConfigError, PeerError
from bigdssm.utils.log import get_logger, is_first_rank

CORES_PER_RANK = 4  # logical cores: about two physical ones
RANKS_HELP = (
    f"processes to train with (default: one per GPU; without GPUs one per {CORES_PER_RANK} cores, at least 1; at most "
    "data.lanes); under a launcher, its number of ranks"
)

logger = get_logger(__name__)


def run(stage: StageName, about: str | None, argv: Sequence[str] | None) -> int:
    """Run `stage` with the command line `argv` and return the exit code; `about` is the help text."""
    launcher = LauncherMonitor()
    parser = command_parser(
        about,
        option("--config", required=True, metavar="FILE", help="YAML file; see configs/"),
        option("overrides", nargs="*", metavar="key=value", help="overrides of dotted config keys, such as run.seed=1"),
        option("--ranks", type=at_least(1), metavar="N", help=RANKS_HELP),
        option(
            "--resume",
            choices=["auto"],
            help="continue from the newest valid checkpoint, if any (default: start from the beginning)",
        ),
        option("--validate", action="store_true", help="validate config and data, build one batch, and stop"),
        option("--probe", action="store_true", help="take three steps; print their memory and rate, and the estimate"),
        option("--local_rank", type=int, default=0, help=argparse.SUPPRESS),  # deepspeed passes it
    )
    arguments = parser.parse_intermixed_args(argv)  # key=value may be anywhere

    def train() -> int | None:
        if arguments.probe and (arguments.validate or arguments.resume):
            raise ConfigError("--probe takes three steps of a new run, needs no --validate and no --resume")
        world_size = check_launch()
        stop = StopRequest()
        if is_rank():
            if arguments.ranks not in (None, world_size):
                raise ConfigError(f"--ranks {arguments.ranks}: the launcher has started {world_size}; omit --ranks")
        elif (ranks := _prepare_ranks(arguments)) > 1:
            command = sys.orig_argv[1:] if argv is None else ["-m", "bigdssm.commands", stage, *argv]
            return run_ranks([sys.executable, *command], ranks, stop, launcher)
        # imported late, because it takes seconds: the launcher is recorded and signal handlers are installed first
        from bigdssm import distributed
        from bigdssm.training.process_group import leave_process_group
        from bigdssm.training.stages import run_stage, stage_lock

        try:
            config = load_config(arguments.config, arguments.overrides)
            with stage_lock():
                if arguments.probe:
                    from bigdssm.training.probe import probe_stage

                    probe_stage(config, stage, world_size=world_size, launcher=launcher, stop=stop)
                    return None
                run_stage(
                    config,
                    stage,
                    resume=arguments.resume == "auto",
                    validate_only=arguments.validate,
                    world_size=world_size,
                    launcher=launcher,
                    stop=stop,
                )
        except BigDSSMError as error:
            if not is_first_rank() and not distributed.is_distributed():
                sys.exit(error.exit_code)  # all ranks have the same error; rank 0 prints it
            raise
        finally:
            raised = sys.exc_info()[1]
            if not isinstance(raised, PeerError):
                _clear_frames(raised)
                leave_process_group()
        return None

    code = run_main(train)
    if code == PeerError.exit_code:
        sys.stderr.flush()
        os._exit(code)  # destroying the process group could block
    return code


def _clear_frames(error: BaseException | None) -> None:
    """Clear the local variables of an error's frames, which would keep the engine and its threads alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _prepare_ranks(arguments: argparse.Namespace) -> int:
    """Return the number of ranks to start, and set the environment that they inherit. Raises ConfigError."""
    from joblib import cpu_count

    lanes = load_config(arguments.config, arguments.overrides).data.lanes
    forced = os.environ.get("DS_ACCELERATOR")
    gpus = 0
    if forced != "cpu":
        import torch  # takes seconds

        gpus = torch.accelerator.device_count()
    if gpus and (arguments.ranks or 1) > gpus:
        raise ConfigError(
            f"--ranks {arguments.ranks}: this machine has {gpus} GPUs; set DS_ACCELERATOR=cpu to train on its cores"
        )
    cores = cpu_count()
    ranks: int = arguments.ranks or max(1, min(gpus or cores // CORES_PER_RANK, lanes))
    where = forced or "gpu"
    if not gpus:
        where = os.environ["DS_ACCELERATOR"] = forced or "cpu"
    if ranks > 1:
        share_cores(ranks)
    threads = os.environ.get("OMP_NUM_THREADS", cores)
    logger.info(
        "ranks: %d on %s, %s threads per rank, %d cores (set by --ranks, DS_ACCELERATOR, OMP_NUM_THREADS)",
        ranks, where, threads, cores,
    )  # fmt: skip
    return ranks
