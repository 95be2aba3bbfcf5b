"""The drawing of canvases that fill: colours, tokens and heat map of all pages that show them."""

from dparallel.pages.html import part


def style() -> str:
    """Its style sheet."""
    return part(__package__, "canvas.css")


def script() -> str:
    """Its script, which says what it draws."""
    return part(__package__, "canvas.js")
