"""Reading Markdown tables."""


def cells(text: str) -> list[list[str]]:
    """The cells of every line of a table in `text`, without the rules below the titles."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("|-", "|:"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
