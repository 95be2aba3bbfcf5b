"""The tables of commit rules in docs/method.md, from what rules and modes declare.

`python -m tests.rule_tables` writes them.
"""

from pathlib import Path

from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.config.modes import MODES
from dparallel.rules.declaration import Rule
from dparallel.rules.rules import RULES

PAGE = Path(__file__).parents[1] / "docs" / "method.md"
BEGIN = "<!-- written by python -m tests.rule_tables: begin -->"
END = "<!-- written by python -m tests.rule_tables: end -->"
GEN_LENGTH = DecodingConfig().gen_length


def tables() -> str:
    """What each rule commits, and the caches and attention patterns that it goes with in each mode."""
    rules = [(f"`{name}`", _commits(rule), _parameters(rule), rule.published) for name, rule in RULES.items()]
    modes = [(f"`{name}`", *(_caches(name, mode) for mode in MODES)) for name in RULES]
    patterns = {name: [pattern or "not stated" for pattern in mode.patterns] for name, mode in MODES.items()}
    heads = [f"`{mode}` (attention pattern: {', '.join(patterns[mode])})" for mode in MODES]
    return (
        _markdown(["rule", "commits", "parameters", "published"], rules)
        + "\nThe caches that a rule goes with, the default first; an empty field is refused.\n\n"
        + _markdown(["rule", *heads], modes)
    )


def _commits(rule: Rule) -> str:
    text = (rule.choose.__doc__ or "").split("\n")[0].rstrip(".")
    return f"{text}; the whole response is one block" if rule.whole_response else text


def _parameters(rule: Rule) -> str:
    texts = []
    for name, parameter in rule.parameters.items():
        default = "" if parameter.default is None else f", default {parameter.default:g}"
        texts.append(f"`{name}`: {parameter.meaning} ({parameter.limits}{default})")
    return "; ".join(texts)


def _caches(rule: str, mode: str) -> str:
    return ", ".join(f"`{cache}`" for cache in MODES[mode].caches if accepted(rule, mode, cache))


def accepted(rule: str, mode: str, cache: str) -> bool:
    """Whether a rule can be combined with a mode and a cache."""
    parameters = RULES[rule].parameters
    needed = {name: parameters[name].least for name, value in RULES[rule].settings.items() if value is None}
    if "steps" in needed:
        needed["steps"] = GEN_LENGTH
    try:
        DecodingConfig(rule=rule, mode=mode, cache=cache, **needed)
    except ConfigError:
        return False
    return True


def _markdown(titles: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]]) + "\n"


def with_tables(text: str) -> str:
    """A page with the tables between its markers."""
    before, began, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert began, f"{PAGE} has no place for the tables"
    assert ended, f"{PAGE} has no place for the tables"
    return f"{before}{BEGIN}\n{tables()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
