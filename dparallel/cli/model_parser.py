"""Arguments of the commands that make a checkpoint of another one: `merge` and `export`."""

from typing import Any, get_args

from dparallel.cli.argument_types import as_path, as_text
from dparallel.config.experiment import AdapterConfig, MergingConfig


def add_merge(commands: Any) -> None:
    """Add `dparallel merge`."""
    summary = "merge a LoRA adapter into its base model, and check that both compute the same"
    command = commands.add_parser(
        "merge",
        help=summary,
        description=f"{summary}. The adapter is in PEFT's layout; its modules have our names or those of the "
        "model's publisher.",
        usage="dparallel merge --model MODEL --adapter ADAPTER --out FOLDER [OPTIONS]",
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", metavar="MODEL", required=True, help="the base model: folder, or Hugging Face Hub id"
    )
    command.add_argument(
        "--adapter",
        metavar="ADAPTER",
        required=True,
        type=as_text,
        help="folder of the adapter or of a training stage, or Hugging Face Hub id",
    )
    command.add_argument(
        "--out", metavar="FOLDER", required=True, type=as_path, help="folder of the merged model"
    )
    command.add_argument(
        "--format",
        choices=get_args(MergingConfig.model_fields["format"].annotation),
        default="auto",
        help="names and files of the merged model: ours, those of the publisher, or those of the base model "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--attention",
        choices=get_args(AdapterConfig.model_fields["attention"].annotation),
        help="attention pattern that the adapter was trained with, such as block_causal of D2F's "
        "(default: that of the base model)",
    )
