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


def policy(scripts: Sequence[str], styles: Sequence[str] | None = None, **further: str) -> Markup:
    """A Content-Security-Policy: nothing is loaded, and no scripts run but these.

    Args:
        scripts, styles: contents of `<script>` and `<style>`; by default any style of the page itself.
        further: other directives, with `_` for `-`, such as `connect_src="'self'"`.
    """
    directives = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'" if styles is None else _digests(styles),
        "script-src": _digests(scripts),
        **{name.replace("_", "-"): value for name, value in further.items()},
    }
    return Markup("; ".join(f"{name} {value}" for name, value in directives.items()))


def _digests(texts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def inline_json(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`, safe for texts such as `</script>` or `<!--`."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
