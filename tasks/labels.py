"""Tags of flow runs and keys of artifacts in Prefect."""

import logging
import re
from collections.abc import Iterable
from uuid import UUID

import httpx
from prefect import get_client, runtime

log = logging.getLogger(__name__)


def tag_run(tags: Iterable[str], run_id: UUID | None = None) -> None:
    """Add tags to a flow run, by default the one in progress; a server that is away does not end the run."""
    run_id = run_id or runtime.flow_run.id
    if run_id is None:
        return
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(run_id)
            client.update_flow_run(run.id, tags=sorted({*run.tags, *tags}))
    except httpx.HTTPError as error:
        log.debug("the flow run was not tagged: %s", error)


def tag_stage(stage: str, experiment: str, **choice: str | None) -> None:
    """Tag the flow run in progress by experiment, student and benchmark, if it is that of this stage."""
    if runtime.flow_run.flow_name == stage:
        named = {"experiment": experiment, **choice}
        tag_run(f"{kind}:{name}" for kind, name in named.items() if name)


def artifact_key(*names: str) -> str:
    """Key of an artifact, whose history Prefect shows: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(names).lower()).strip("-")
