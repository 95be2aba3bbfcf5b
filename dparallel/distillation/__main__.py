"""Launch target: `torchrun --standalone --nproc_per_node N -m dparallel.distillation PLAN.json`."""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from pydantic import ValidationError

from dparallel.config.base import ConfigError
from dparallel.distillation.engine import LaunchError, launched_process
from dparallel.distillation.trainer import DivergedError, run_stage
from dparallel.models.formats import CheckpointError
from dparallel.models.lora import AdapterError
from dparallel.stages.experiment import StagePlan
from dparallel.stages.manifest import StageError
from dparallel.trajectories.schema import ForeignShardError

# What a user can put right; the message suffices. Anything else is a bug and keeps its traceback.
CLEAR_ERRORS = (
    *(LaunchError, DivergedError, ConfigError, StageError, CheckpointError, AdapterError),
    *(ForeignShardError, ValidationError, FileNotFoundError),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="dparallel.distillation", description=__doc__)
    parser.add_argument("plan", type=Path, help="a training StagePlan as JSON")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("dparallel").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft, torch and transformers about each other
    try:
        launched_process()
        plan = StagePlan.model_validate_json(arguments.plan.read_text(encoding="utf-8"))
        if plan.stage != "training":
            raise ConfigError(f"{arguments.plan} is a plan of stage {plan.stage!r}, expected 'training'")
        run_stage(plan.settings(), plan.inputs, plan.out_dir, plan.code)
    except CLEAR_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
