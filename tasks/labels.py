"""Tags of flow runs and keys of artifacts in Prefect."""

import logging
import re
from collections.abc import Iterable
from uuid import UUID

import httpx
from prefect import get_client, runtime

from dparallel.stages.manifest import digest

PLAIN = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")  # names of which keys are made without loss
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
    """Key of an artifact, whose history Prefect shows: small letters, digits and dashes.

    Different names have different keys: an underscore is two dashes, and keys of names with other characters
    end with a digest of these.
    """
    plain = "-".join(names[1:]).replace(" ", "-")
    if PLAIN.fullmatch(names[0]) and PLAIN.fullmatch(plain):
        return f"{names[0]}-{plain}".replace("_", "--").strip("-")
    text = "-".join(names)
    short = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return f"{short}-{digest(text)[:6]}"
