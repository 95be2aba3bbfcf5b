"""Started by the launch tests in place of training: python -m tests.tasks.child PLAN."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from dparallel.distillation.errors import report
from dparallel.stages.lease import LeaseHeldError


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank, folder = os.environ["RANK"], Path(plan["out_dir"])
    folder.mkdir(exist_ok=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    print(
        f"rank {rank} of {os.environ['WORLD_SIZE']} → {os.environ.get('OMP_NUM_THREADS')} threads", flush=True
    )
    if plan["config"]["ends"] == "badly":
        raise ValueError("the loss is not a number at train_step 7")
    if plan["config"]["ends"] == "refused":
        sys.exit(report(LeaseHeldError(f"{folder} is in use by\nprocess 7")))
    if plan["config"]["ends"] == "killed" and rank == "0":
        while not (folder / "pid-1").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    if plan["config"]["ends"] in ("never", "killed"):
        time.sleep(600)


if __name__ == "__main__":
    main()
