"""The page at `/`: its document, the headers it is sent with, and who gets it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import httpx
import pytest

from dparallel.config.modes import MODES
from dparallel.rules.rules import RULES
from dparallel.serving.engine import Served
from dparallel.serving.middleware import is_local
from dparallel.serving.page.page import chat_page
from tests.dparallel.serving.conftest import Running, serving


def directives(policy: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_it_is_served_with_a_policy_that_lets_only_its_own_parts_run(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    allowed = directives(answer.headers["content-security-policy"])
    assert allowed["default-src"] == ["'none'"]
    assert allowed["connect-src"] == ["'self'"]
    assert allowed["frame-ancestors"] == allowed["base-uri"] == allowed["form-action"] == ["'none'"]
    [script] = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert allowed["script-src"] == [digest(script)]
    assert allowed["style-src"] == [digest(style)]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    head = client.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


def test_it_loads_nothing_and_makes_no_markup_of_texts() -> None:
    html = chat_page().html
    assert not re.search(r"https?://|//\w|src=|@import|url\(", re.sub(r"^\s*//.*$", "", html, flags=re.M))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval\(", html)
    assert not re.search(r"\son\w+=|\sstyle=", html), "the policy lets neither run"
    assert "localStorage" not in html
    assert "sessionStorage" not in html


class Controls(HTMLParser):
    """Controls that have no name for assistive technology, except controls that the script names."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: set[str] = set()
        self.nameless: list[dict[str, str | None]] = []
        self.inside = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inside += tag == "label"
        if tag == "label" and given.get("for"):
            self.labels.add(str(given["for"]))
        if tag in ("input", "textarea", "select") and not (self.inside or "aria-label" in given):
            self.nameless.append(given)

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "label"


def test_controls_have_labels() -> None:
    controls = Controls()
    controls.feed(chat_page().html)
    nameless = [given for given in controls.nameless if given.get("id") not in controls.labels]
    assert [given.get("class") or given.get("type") for given in nameless] == [
        "model",
        "slide",
        "exact",
        "range",
    ], "the test in the browser sees that the script names these"


def test_the_page_knows_what_is_declared() -> None:
    html = chat_page().html
    for name, rule in RULES.items():
        assert f'"{name}":{{"whole_response":{str(rule.whole_response).lower()}' in html
        assert all(f'"meaning":"{parameter.meaning}"' in html for parameter in rule.parameters.values())
    assert all(f'"{name}":{{"fixed"' in html for name in MODES)


def test_it_needs_no_key_and_is_part_of_no_other_site(teacher: Served) -> None:
    with serving(teacher, key="secret") as server, server.client() as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "tiny" not in page.text, "not even the names of models"
        assert client.get("/v1/models").status_code == 401
        for path in ("/", "/v1/models", "/v1/chat/completions"):
            headers = {"origin": "https://example.com", "access-control-request-method": "POST"}
            for answer in (client.get(path, headers=headers), client.options(path, headers=headers)):
                assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_what_models_says_to_clients(client: httpx.Client) -> None:
    tiny, endless = client.get("/v1/models").json()["data"]
    assert tiny["chat"] is True, "the server has a template"
    assert tiny["end_token_ids"] == [2]
    assert tiny["modes"] == [name for name, mode in MODES.items() if None in mode.patterns]
    assert set(RULES) - set(tiny["rules"]) == {"learned"}, "no rule was fitted for it"
    assert client.get("/v1/models/endless").json() == endless


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("localhost.:80", True),
        ("chat.localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("192.168.1.5", True),
        ("[::1]:8000", True),
        ("", True),
        ("evil.com", False),
        ("evil.com:8000", False),
        ("localhost.evil.com", False),
        ("127.0.0.1.evil.com:8000", False),
        ("notlocalhost", False),
        ("[evil.com]", False),
        ("127.1", False),
    ],
)
def test_names_of_this_machine(host: str, local: bool) -> None:
    assert is_local(host) == local


def test_another_sites_name_is_refused_on_this_machine_without_a_key(teacher: Served) -> None:
    def asked(server: Running) -> httpx.Response:
        with server.client() as client:
            return client.get("/v1/models", headers={"host": "evil.com", "authorization": "Bearer secret"})

    with serving(teacher, loopback=True) as server:
        answer = asked(server)
        assert answer.status_code == 421
        assert "'evil.com'" in answer.json()["error"]["message"]
        with server.client() as client:
            assert client.get("/").status_code == 200
            assert 'dparallel_requests_total{endpoint="/",status="200"} 1.0' in client.get("/metrics").text
    with serving(teacher, loopback=True, key="secret") as server:
        assert asked(server).status_code == 200, "a proxy may keep the name; others do not know the key"
    with serving(teacher) as server:
        assert asked(server).status_code == 200, "reached over a network, it has names of its own"
