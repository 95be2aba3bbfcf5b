"""Entry point of training processes.

Started as `torchrun --standalone --nproc_per_node N -m dparallel.distillation PLAN.json`.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from pydantic import ValidationError

from dparallel.config.base import ConfigError, UserError
from dparallel.distillation.engine import launched_process
from dparallel.distillation.errors import PROGRAM, report
from dparallel.distillation.trainer import run_stage
from dparallel.stages.experiment import StagePlan
from dparallel.stages.streams import set_encodings


def main() -> int:
    set_encodings()
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("plan", type=Path, help="a training StagePlan as JSON")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("dparallel").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between peft, torch and transformers
    try:
        launched_process()
        plan = read_plan(arguments.plan)
        if plan.stage != "training":
            raise ConfigError(f"{arguments.plan} is a plan of stage {plan.stage!r}, expected 'training'")
        run_stage(plan.settings(), plan.inputs, plan.out_dir, plan.origin)
    except UserError as error:
        return report(error)
    return 0


def read_plan(file: Path) -> StagePlan:
    """Read a StagePlan from a JSON file; ConfigError if it is not one."""
    try:
        return StagePlan.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{file} is not a StagePlan as JSON: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
