"""The page of a server: chat, and canvases that fill. It is a client of the API like any other."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from markupsafe import Markup

from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import MODES
from dparallel.pages import canvas
from dparallel.pages.html import inline_json, part, policy, template
from dparallel.rules.rules import RULES

SCRIPTS = ("client.js", "settings.js", "pane.js", "page.js")  # in this order


@dataclass(frozen=True)
class Document:
    """An HTML page with the headers that it is sent with."""

    html: str
    headers: Mapping[str, str]


@cache
def chat_page() -> Document:
    """The page. It holds nothing of the server: what is served, it asks for with the user's key."""
    script = "\n" + canvas.script() + "".join(part(__package__, name) for name in SCRIPTS)
    style = "\n" + canvas.style() + part(__package__, "page.css")
    html = template(__package__, "page.html").render(
        style=Markup(style), script=Markup(script), declared=inline_json(_declared())
    )
    policies = policy(
        [script],
        [style],
        connect_src="'self'",
        img_src="data:",  # the empty icon, for which browsers ask otherwise
        base_uri="'none'",
        form_action="'none'",
        frame_ancestors="'none'",
        require_trusted_types_for="'script'",  # texts never become markup
        trusted_types="'none'",
    )
    headers = {
        "content-security-policy": str(policies),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return Document(html, headers)


def _declared() -> dict[str, object]:
    """The rules and modes of decoding, as they are declared."""
    rules = {
        name: {
            "whole_response": rule.whole_response,
            "scheduled": rule.scheduled,
            "parameters": {key: parameter._asdict() for key, parameter in rule.parameters.items()},
        }
        for name, rule in RULES.items()
    }
    modes = {
        name: {"fixed": dict(mode.fixed), "usual": dict(mode.usual), "scheduled": mode.scheduled}
        for name, mode in MODES.items()
    }
    return {"rules": rules, "modes": modes, "rule": DecodingConfig.model_fields["rule"].default}
