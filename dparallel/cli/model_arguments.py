"""Arguments of the commands that make a checkpoint of another one: `merge` and `export`."""

from typing import Any, get_args

from dparallel.cli.argument_types import as_path, as_text
from dparallel.cli.shared_arguments import add_command, add_folder_of_runs, add_model
from dparallel.config.experiment import AdapterConfig, MergingConfig


def add_merge(commands: Any) -> None:
    """Add `dparallel merge`."""
    command = add_command(
        commands,
        "merge",
        "merge a LoRA adapter into its base model, and check that both compute the same",
        "The adapter is in PEFT's layout; its modules have our names or those of the model's publisher.",
        "--model MODEL --adapter ADAPTER --out FOLDER [OPTIONS]",
    )
    add_model(command)
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
    _add_attention(command)


FORMATS = ("original", "native", "llama", "adapter")


def add_export(commands: Any) -> None:
    """Add `dparallel export`."""
    command = add_command(
        commands,
        "export",
        "write a model, or an adapter, as other programs read it, with a model card",
        usage="--model MODEL --format FORMAT --out FOLDER [OPTIONS]",
    )
    add_model(command)
    command.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="original: names and config of LLaDA or Dream, with model code that transformers loads; native: "
        "our format; llama: names and config of Llama or Qwen2, for engines; adapter: only --adapter, with "
        "the publisher's module names",
    )
    command.add_argument("--out", metavar="FOLDER", required=True, type=as_path, help="a new folder")
    command.add_argument(
        "--adapter",
        metavar="ADAPTER",
        type=as_text,
        help="LoRA adapter of the model, which is merged first (with --format adapter: written alone)",
    )
    _add_attention(command)
    command.add_argument(
        "--run",
        metavar="RUN",
        type=as_text,
        help="experiment or benchmark stage whose table of results is put into the model card",
    )
    add_folder_of_runs(command, "folder of experiments, for --run")


def _add_attention(command: Any) -> None:
    command.add_argument(
        "--attention",
        choices=get_args(AdapterConfig.model_fields["attention"].annotation),
        help="attention pattern that the adapter was trained with, such as block_causal of D2F's "
        "(default: that of the base model)",
    )
