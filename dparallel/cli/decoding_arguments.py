"""Arguments of the commands that decode: a flag for every setting of decoding."""

import argparse
import re
from collections.abc import Mapping
from typing import Any, get_args

from dparallel.cli.argument_types import as_text
from dparallel.cli.shared_arguments import add_command, add_device, add_model
from dparallel.config.decoding import DecodingConfig, parameters_by_name
from dparallel.config.files import parse_yaml
from dparallel.config.foreign import FOREIGN_SETTINGS
from dparallel.config.modes import SETTINGS
from dparallel.rules.declaration import Parameter
from dparallel.rules.rules import RULES
from dparallel.stages.arguments import Parser


def _meanings(takers: Mapping[str, Parameter]) -> str:
    """What a parameter means, with the rules that take it."""
    rules: dict[str, list[str]] = {}
    for rule, parameter in takers.items():
        default = "" if parameter.default is None else f" (default: {parameter.default})"
        rules.setdefault(parameter.meaning, []).append(rule + default)
    return "; ".join(f"{', '.join(names)}: {meaning}" for meaning, names in rules.items())


TAKERS = {
    name: takers for name, takers in parameters_by_name().items() if name in DecodingConfig.model_fields
}
DECODING = {  # settings of decoding, and what they do
    "gen_length": "response length in tokens",
    "block_length": "tokens per block",
    "rule": f"which tokens a forward pass commits: {', '.join(RULES)}",
    **{name: _meanings(takers) for name, takers in TAKERS.items()},
    "mode": "when a block becomes active; revising: only models trained for it",
    **{name: setting.meaning for name, setting in SETTINGS.items()},
    "cache": "which keys and values are kept",
    "stop_at_eos": "stop at an end-of-sequence token",
    "eos_fill": "fill everything behind an end-of-sequence token at once, in sequential and multi_block",
    "suppress_eos": "never predict an end of sequence",
}
SAMPLING = {
    "temperature": "0 takes the most likely token",
    "top_p": "sample from the most likely tokens with this total probability",
    "top_k": "sample from this number of most likely tokens",
    "seed": "equal seeds and prompts give equal tokens",
}
HARDWARE = {"compile": "compiled kernels with fixed shapes; on a GPU, CUDA graphs"}
IN_FULL = "All settings in full: python -m pydoc dparallel.DecodingConfig"


def given_decoding(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of decoding that are given as flags.

    Raises:
        ConfigError: a value is no YAML.
    """
    return {
        name: parse_yaml(value, f"{flag_of(name)} {value}") if isinstance(value, str) else value
        for name, value in vars(options).items()
        if name in DecodingConfig.model_fields
    }


def in_flags(message: str) -> str:
    """A message with the settings of decoding called as their flags are, such as `--gen-length=25`."""
    names = "|".join(name for name in (*DECODING, *SAMPLING) if "_" in name)
    return re.sub(rf"\b({names})\b", lambda found: flag_of(found[1]), message)


def flag_of(field: str) -> str:
    """The flag of a setting of decoding, such as `--gen-length`."""
    return f"--{field.replace('_', '-')}"


def as_flags(advice: str) -> str:
    """Advice with settings of decoding as they are given to commands, such as `--rule steps`."""
    names = "|".join((*DECODING, *SAMPLING))
    return in_flags(re.sub(rf"\b({names}):( true\b)?", lambda found: flag_of(found[1]), advice))


def add_decoding_command(
    commands: Any, name: str, summary: str, required: str = "", several: bool = False
) -> tuple[argparse.ArgumentParser, Any, Any]:
    """Add a command that decodes, with the options common to such commands.

    Args:
        required: what must be given beside the model, for the line of usage.
        several: whether --model may be given several times.

    Returns:
        The command, its first group of options, and that of the hardware.
    """
    command = add_command(commands, name, summary, usage=f"--model MODEL {required}[OPTIONS]")
    first = command.add_argument_group("what is decoded")
    add_model(first, several)
    first.add_argument(
        "--adapter", metavar="ADAPTER", type=as_text, help="LoRA adapter that is merged into the model"
    )
    hardware = add_decoding(command)
    add_device(hardware)
    return command, first, hardware


def add_decoding(command: argparse.ArgumentParser, defaults: bool = True) -> Any:
    """Add a flag for every setting of decoding; flags that are not given are absent from the options.

    Args:
        defaults: show the defaults of the settings; otherwise those of the protocol count.

    Returns:
        The group of options of the hardware.
    """
    if isinstance(command, Parser):
        command.foreign = {flag_of(name): as_flags(advice) for name, advice in FOREIGN_SETTINGS.items()}
    beside = "" if defaults else "The protocol's settings, unless they are given. "
    decoding = command.add_argument_group("decoding", beside + IN_FULL)
    sampling, hardware = command.add_argument_group("sampling"), command.add_argument_group("hardware")
    for group, settings in ((decoding, DECODING), (sampling, SAMPLING), (hardware, HARDWARE)):
        for name, text in settings.items():
            _add_setting(group, name, text, defaults)
    return hardware


def _add_setting(group: Any, field: str, text: str, defaults: bool) -> None:
    info = DecodingConfig.model_fields[field]
    known = "" if info.default is None or not defaults else f" (default: {info.default})"
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field, "help": text + known}
    if info.annotation is bool:
        group.add_argument(flag_of(field), action=argparse.BooleanOptionalAction, **common)
        return
    kinds = (info.annotation, *get_args(info.annotation))  # of `Literal[…] | None` as well
    words = dict.fromkeys(word for kind in kinds for word in get_args(kind) if isinstance(word, str))
    group.add_argument(flag_of(field), metavar="|".join(words) or "VALUE", **common)
