"""Command line options that several benchmarks share."""

import argparse
from typing import Any

import torch

from benchmarks.common.shapes import SHAPES


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


class Distinct(argparse.Action):
    """Keeps each of an option's values once, in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def chosen_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """The device of the options, with an error if a large shape would run on a CPU by accident."""
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no GPU here; drop --device or give --device cpu")
    shape = getattr(options, "shape", None)
    if shape and SHAPES[shape].large and options.device is None and not cuda:
        small = ", ".join(name for name, shape in SHAPES.items() if not shape.large)
        parser.error(
            f"--shape {shape} needs a GPU, and torch sees none here: run it where there is one, "
            f"choose a small shape ({small}), or give --device cpu, tens of GB of memory and hours"
        )
    return torch.device(options.device or ("cuda" if cuda else "cpu"))
