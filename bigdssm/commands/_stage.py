"""The command line that both stages share: `bigdssm STAGE --config F [key=value …]`, alone or as a rank."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bigdssm.cli import run_main
from bigdssm.cluster.launcher import Launcher, check_launch
from bigdssm.cluster.signals import StopRequest
from bigdssm.config import StageName, load_config
from bigdssm.errors import BigDSSMError, PeerError
from bigdssm.utils.log import is_first_rank


def run(stage: StageName, about: str | None, argv: Sequence[str] | None) -> int:
    """Run `stage` as the command line `argv` says and return the exit code; `about` is its help."""
    launcher = Launcher()
    arguments = _parser(about).parse_intermixed_args(argv)  # key=value may stand anywhere

    def train() -> None:
        world_size = check_launch()
        stop = StopRequest()
        # They take seconds; by now it is known who stands above this process, and signals are heard.
        from bigdssm import distributed
        from bigdssm.training.stages import run_stage, sole_stage

        try:
            config = load_config(arguments.config, arguments.overrides)
            with sole_stage():
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
                sys.exit(error.exit_code)  # every rank has found the same; rank 0 says it
            raise
        finally:
            if not isinstance(sys.exc_info()[1], PeerError):
                distributed.shutdown()

    code = run_main(train)
    if code == PeerError.exit_code:
        sys.stderr.flush()
        os._exit(code)  # what is left of the process group may never answer
    return code


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted config keys, for example run.seed=1")
    parser.add_argument("--resume", choices=["auto"], help="go on from the newest good checkpoint, if there is one")
    parser.add_argument("--validate", action="store_true", help="check config and data, make one batch, and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed passes it
    return parser
