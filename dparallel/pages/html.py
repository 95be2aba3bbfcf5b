"""Self-contained HTML pages: templates that escape texts, data for scripts, and a policy against others."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

ENVIRONMENT = Environment(
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def template(package: str | None, name: str) -> Template:
    """A template beside a module; texts are escaped unless they are `Markup`."""
    return ENVIRONMENT.from_string(part(package, name))


def part(package: str | None, name: str) -> str:
    """The text of a file beside a module, such as a script of a page."""
    assert package is not None
    return files(package).joinpath(name).read_text(encoding="utf-8")


def policy(scripts: Sequence[str]) -> Markup:
    """A Content-Security-Policy: nothing is loaded, and no scripts run but these (contents of `<script>`)."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return Markup(f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}")


def inline_json(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`, safe for texts such as `</script>` or `<!--`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
