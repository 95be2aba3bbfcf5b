"""Automations of a server follow the settings: notifications end when their address is taken out."""

from pathlib import Path

from prefect import get_client
from prefect.settings import PREFECT_API_URL

from deploy.local.api import Server

FILES = list((Path(__file__).parents[2] / "deploy" / "automations").glob("*.yaml"))


def test_notifications_are_switched_off_and_on(prefect_server: None) -> None:
    def enabled() -> dict[str, bool]:
        with get_client(sync_client=True) as client:
            found = client.request("POST", "/automations/filter", json={}).json()
        return {each["name"]: each["enabled"] for each in found}

    server = Server(str(PREFECT_API_URL.value()).removesuffix("/api"))
    address = "http://127.0.0.1:9/hook"
    for notify, names, wanted in (
        ("", ["lost runs"], {"lost runs": True}),
        (address, ["failures", "lost runs"], {"failures": True, "lost runs": True}),
        ("", ["lost runs"], {"failures": False, "lost runs": True}),
        (address, ["failures", "lost runs"], {"failures": True, "lost runs": True}),
    ):
        assert server.create_missing_automations(FILES, notify) == names
        assert enabled() == wanted
