"""The command `dparallel merge`."""

import argparse
from pathlib import Path

from dparallel.config.base import UserError
from dparallel.config.experiment import MergingConfig
from dparallel.distillation.merging import merge_adapter, random_canvases
from dparallel.models.checkpoints import read_config


def merge(options: argparse.Namespace) -> None:
    """Merge `--adapter` into `--model`, and print where the result is and how far it differs.

    Raises:
        UserError: the model or adapter cannot be read, they do not fit together, or the folder is not empty.
    """
    folder = Path(options.out)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder} is not empty: give a new folder")
    config = MergingConfig(format=options.format)
    canvases = random_canvases(read_config(options.model), config.check_prompts)
    merged = merge_adapter(options.model, options.adapter, folder, config, options.attention, canvases)
    print(
        f"{folder}: {merged.format} format, {merged.dtype}; logits differ from those of base + adapter by at "
        f"most {merged.difference:.2g} merged in float32, {merged.saved_difference:.2g} as saved"
    )
