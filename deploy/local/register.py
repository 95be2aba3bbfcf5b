"""Work pools, deployments and automations of a Prefect server: `python -m deploy.local.register`.

DPARALLEL_CPU_RUNS is how many runs the workers of the cpu pool take at a time, together (default 2).
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.local import api
from deploy.local.processes import ServiceError
from deploy.local.services import POOLS, with_programs

DEPLOY = Path(__file__).parents[1]
DEPLOYED = "deployed.json"
LOG = "deploy.log"
EXPERIMENTS = "experiments"  # queue of the cpu pool, for runs that wait for others of the pool


def register(
    server: api.Server,
    variables: Mapping[str, str],
    root: Path,
    data: Path,
    say: Callable[[str], None],
    cpu_slots: int,
    notify: str = "",
) -> None:
    """Give the server what it lacks; what is there is left as it is, but deployments of changed flows.

    Args:
        variables: environment variables for Prefect's command.
        data: the folder that remembers what was deployed.
        cpu_slots: how many runs the workers of the cpu pool take at a time. One is kept free for stages: if
            runs of `distill/full` had all of them, they would wait for stages that never start.
        notify: address that is told of failed runs.
    """
    known = server.pools()
    for pool in POOLS:
        if pool not in known:
            server.create_pool(pool, DEPLOY / "pools" / "process.json")
            say(f"work pool {pool}: created")
    server.limit_queue("cpu", EXPERIMENTS, max(cpu_slots - 1, 1))
    _deploy(server, variables, root, data, say)
    automations = server.create_missing_automations((DEPLOY / "automations").glob("*.yaml"), notify)
    say(f"automations: {', '.join(automations)}")


def _deploy(
    server: api.Server, variables: Mapping[str, str], root: Path, data: Path, say: Callable[[str], None]
) -> None:
    """`prefect deploy --all`, unless the server has the deployments of these files already."""
    files = [root / "prefect.yaml", *sorted((root / "flows").glob("*.py"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    path = data / DEPLOYED
    ids = sorted(server.deployments())
    environment = with_programs(variables)
    # Workers with folders of their own say themselves where these are, when they start a run.
    own = environment.pop("DPARALLEL_FOLDER", None) is not None
    place = "{{ $DPARALLEL_FOLDER }}" if own else str(root)
    now = {"root": place, "files": digest, "deployments": ids}
    if ids and path.exists() and json.loads(path.read_text(encoding="utf-8")) == now:
        say(f"deployments: {len(ids)} are there")
        return
    say("deployments: prefect deploy --all")
    log = data / "logs" / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=root,
            env={**environment, "PWD": place},  # which prefect.yaml gives to the workers
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise ServiceError("\n".join([f"prefect deploy --all failed; the end of {log}:", *end]))
    now["deployments"] = sorted(server.deployments())
    path.write_text(json.dumps(now), encoding="utf-8")
    say(f"deployments: {len(now['deployments'])}")


if __name__ == "__main__":
    root, url = Path.cwd(), os.environ["PREFECT_API_URL"]
    data = root / os.environ.get("DPARALLEL_DATA", ".dparallel")
    notify = os.environ.get("DPARALLEL_NOTIFY_URL", "")
    variables = {"PREFECT_API_URL": url}
    slots = int(os.environ.get("DPARALLEL_CPU_RUNS") or 2)
    register(api.Server(url.removesuffix("/api")), variables, root, data, print, slots, notify)
