"""The command `dparallel export`."""

import argparse
from pathlib import Path

from dparallel.config.base import ConfigError
from dparallel.config.modes import MODES
from dparallel.models.adapters import write_adapter
from dparallel.models.checkpoints import load_model, load_tokenizer, read_config
from dparallel.models.defaults import decoding_of_model
from dparallel.models.export import export_model, generates, original_type
from dparallel.reporting.card import model_card, results_of
from dparallel.stages.files import write_atomically

CARD = "README.md"


def export(options: argparse.Namespace) -> None:
    """Write `--model` in `--format` to `--out`, with a model card, and print the files.

    Raises:
        UserError: the model cannot be read, the format does not have it, or the folder is not empty.
    """
    folder = Path(options.out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder} is not empty: give a new folder")
    if options.attention is not None and options.adapter is None:
        raise ConfigError(
            "--attention is the pattern that an adapter was trained with: give --adapter as well"
        )
    results = results_of(options.run, options.runs) if options.run is not None else []
    merged_first = False
    if options.format == "adapter":
        if options.adapter is None:
            raise ConfigError("--format adapter writes an adapter alone: give --adapter")
        config = read_config(options.model)
        stated = config.attention_pattern
        config.attention_pattern = options.attention or stated
        merged_first = stated not in (None, config.attention_pattern)
        files = write_adapter(options.adapter, config, original_type(config), folder)
        decoding = None
    else:
        model = load_model(options.model, "cpu", adapter=options.adapter)
        config = model.config
        config.attention_pattern = options.attention or config.attention_pattern
        decoding = decoding_of_model(model)
        if config.attention_pattern not in MODES[decoding.mode].patterns:  # built in, and not for this model
            decoding = None
        files = export_model(model, load_tokenizer(options.model), folder, options.format, decoding)
    other = options.format == "original" and (decoding is None or not generates(config, decoding))
    card = model_card(
        options.model, options.adapter, options.format, config, decoding, results, other, merged_first
    )
    write_atomically(folder / CARD, card)
    print(f"{folder}: {', '.join([CARD, *files])}")
