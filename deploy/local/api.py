"""The few questions and requests to Prefect's server, without the seconds that importing Prefect takes."""

import json
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

BUSY_TRIES, BUSY_SECONDS = 10, 1.0  # Prefect's answer while its database is locked, on SQLite
WEBHOOK = "dparallel-notify"  # block with the address for notifications
IN_PROGRESS = ("PENDING", "RUNNING", "CANCELLING")


class Server:
    """Prefect's REST interface."""

    def __init__(self, url: str):
        self._client = httpx.Client(base_url=f"{url}/api", timeout=30, trust_env=False)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        for _ in range(BUSY_TRIES):
            answer = self._client.request(method, path, json=body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(BUSY_SECONDS)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def pools(self) -> dict[str, dict[str, Any]]:
        return {pool["name"]: pool for pool in self._ask("POST", "/work_pools/filter", {})}

    def create_pool(self, name: str, template: Path) -> None:
        body = {
            "name": name,
            "type": "process",
            "base_job_template": json.loads(template.read_text(encoding="utf-8")),
        }
        self._ask("POST", "/work_pools/", body)

    def limit_queue(self, pool: str, queue: str, runs: int) -> None:
        """Let at most so many runs of a pool's queue be in progress; the queue is created if need be."""
        known = {each["name"] for each in self._ask("POST", f"/work_pools/{pool}/queues/filter", {})}
        if queue in known:
            self._ask("PATCH", f"/work_pools/{pool}/queues/{queue}", {"concurrency_limit": runs})
        else:
            self._ask("POST", f"/work_pools/{pool}/queues", {"name": queue, "concurrency_limit": runs})

    def workers_online(self, pool: str) -> dict[str, float]:
        """Time of the last heartbeat, in seconds since 1970, of the pool's workers that are online."""
        found = self._ask("POST", f"/work_pools/{pool}/workers/filter", {})
        return {
            worker["name"]: _seconds(worker["last_heartbeat_time"])
            for worker in found
            if worker["status"] == "ONLINE" and worker["last_heartbeat_time"]
        }

    def deployments(self) -> dict[str, dict[str, Any]]:
        """Deployments by id, with their full name `flow/deployment` as `full_name`."""
        flows = {flow["id"]: flow["name"] for flow in self._ask("POST", "/flows/filter", {})}
        found = self._ask("POST", "/deployments/filter", {})
        return {
            each["id"]: {**each, "full_name": f"{flows.get(each['flow_id'], '?')}/{each['name']}"}
            for each in found
        }

    def create_missing_automations(self, files: Iterable[Path], notify: str = "") -> list[str]:
        """Create those automations of the files whose names the server does not have.

        Args:
            notify: address for notifications; if it is empty, automations that need it are left out, and
                switched off if the server has them.

        Returns:
            The names of all that the server has now.
        """
        known = {each["name"]: each for each in self._ask("POST", "/automations/filter", {})}
        webhook = self._webhook(notify) if notify else None
        names = []
        for file in sorted(files):
            automation = yaml.safe_load(file.read_text(encoding="utf-8"))
            notifying = [each for each in automation["actions"] if each["type"] == "call-webhook"]
            there = known.get(automation["name"])
            wanted = webhook is not None or not notifying
            if notifying and there is not None and there["enabled"] != wanted:  # the address came or went
                self._ask("PATCH", f"/automations/{there['id']}", {"enabled": wanted})
            if not wanted:
                continue
            for action in notifying:
                action["block_document_id"] = webhook
            names.append(automation["name"])
            if there is None:
                self._ask("POST", "/automations/", automation)
        return names

    def _webhook(self, url: str) -> str:
        """Id of the block that holds the address for notifications, which Prefect treats as a secret."""
        kind = self._ask("GET", "/block_types/slug/webhook")["id"]
        body = {"block_schemas": {"block_type_id": {"any_": [kind]}}}
        schema = self._ask("POST", "/block_schemas/filter", body)[0]["id"]
        data = {"url": url, "method": "POST"}
        body = {"block_documents": {"block_type_id": {"any_": [kind]}, "name": {"any_": [WEBHOOK]}}}
        there = self._ask("POST", "/block_documents/filter", {**body, "include_secrets": True})
        if there and there[0]["data"].get("url") == url:
            return str(there[0]["id"])
        if there:
            changed = {"data": data, "block_schema_id": schema, "merge_existing_data": False}
            self._ask("PATCH", f"/block_documents/{there[0]['id']}", changed)
            return str(there[0]["id"])
        made = {"name": WEBHOOK, "data": data, "block_type_id": kind, "block_schema_id": schema}
        return str(self._ask("POST", "/block_documents/", made)["id"])

    def runs(self, ids: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Flow runs in progress, or the ones with the given ids; the oldest first."""
        wanted: dict[str, Any] = {"state": {"type": {"any_": list(IN_PROGRESS)}}}
        if ids is not None:
            wanted = {"id": {"any_": list(ids)}}
        body = {"flow_runs": wanted, "sort": "START_TIME_ASC"}
        found: list[dict[str, Any]] = self._ask("POST", "/flow_runs/filter", body)
        return found

    def set_state(self, run: str, state: str, message: str) -> None:
        """Give a flow run another state, whatever Prefect's rules say for CANCELLED."""
        body = {"state": {"type": state, "message": message}, "force": state == "CANCELLED"}
        self._ask("POST", f"/flow_runs/{run}/set_state", body)


def answers(address: str) -> bool:
    """Whether a server says that it is healthy."""
    try:
        return httpx.get(address, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def ago(seconds: float) -> str:
    """A time in words, such as `3 min ago`."""
    passed = max(time.time() - seconds, 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return f"{passed:.0f} s ago"
