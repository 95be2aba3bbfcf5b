"""Boxes in LaTeX. Pure functions of texts, in linear time."""

import re

# A backslash escapes the character behind it, so `\{` neither opens nor closes a box.
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{)?|\\.|\{|\}", re.DOTALL)
_WITHOUT_BRACES = re.compile(r"(?:[^$\n\\.]|\.(?=\d))*")


def last_box(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}`; None if there is none.

    The last one is the one that begins last: of nested boxes the innermost. A box that never closes, as at
    the end of a truncated response, does not count. Without braces, as in `$\boxed 2$`, the content reaches
    to the end of the sentence, formula or line.
    """
    opened: list[int | None] = []  # of every open brace: where its content begins if it opens a box
    last: tuple[int, int] | None = None
    for found in _BOX_OR_BRACE.finditer(text):
        mark = found[0]
        box = (found.end(), found.end())
        if mark == "{" or found[1]:
            opened.append(found.end() if found[1] else None)
            continue
        if mark == "}":
            begin = opened.pop() if opened else None
            if begin is None:
                continue
            box = (begin, found.start())
        elif mark.startswith(("\\boxed", "\\fbox")):
            content = _WITHOUT_BRACES.match(text, found.end())
            assert content is not None  # it may be empty
            box = content.span()
        else:
            continue
        if last is None or box[0] > last[0]:
            last = box
    return None if last is None else text[slice(*last)].strip()
