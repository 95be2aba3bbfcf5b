"""`dparallel generate`: decode a prompt, or a file of prompts with results as JSON Lines."""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dparallel.cli import display
from dparallel.cli.infill import infill
from dparallel.cli.model import answer, open_decoding, open_model, open_tokenizer, text_of, timed_generate
from dparallel.cli.outputs import check_different, check_writable
from dparallel.cli.prompts import Request, Result, encode, read_requests
from dparallel.cli.results import Results, check_unused, collect
from dparallel.cli.trace.page import trace_page
from dparallel.config.base import ConfigError
from dparallel.config.decoding import DecodingConfig
from dparallel.decoding.canvas import Generation, Step
from dparallel.models.backbone import DiffusionTransformer
from dparallel.models.hub import checkpoint_folder
from dparallel.problems.prompts import tokenizer_fingerprint
from dparallel.problems.stops import stop_at
from dparallel.stages.files import write_atomically
from dparallel.stages.manifest import digest


def generate(options: argparse.Namespace) -> None:
    """Decode `--prompt` or `--prompts`, or fill the gaps of `--infill`.

    Raises:
        UserError: an option, a prompt or the model cannot be used, or a file cannot be written.
    """
    if options.infill is not None:
        infill(options)
        return

    # 1. Check everything, first what does not need the weights.
    if options.prompts is None and options.prompt is None:
        raise ConfigError("nothing is decoded: give --prompt TEXT, --prompts FILE or --infill TEXT")
    if options.prompts is not None:
        requests = read_requests(options.prompts, options.prompt_field)
    elif options.out is not None:
        raise ConfigError(f"--out {options.out} takes the results of --prompts; that of --prompt is printed")
    else:
        requests = [Request("--prompt", options.prompt)]
    check_writable("--out", options.out)
    check_writable("--trace", options.trace)
    check_different(options.out, options.trace)
    check_unused(options.out)
    decoding = open_decoding(options)
    tokenizer, model = open_tokenizer(options), open_model(options)
    prompts = encode(requests, tokenizer, model, decoding, options.raw)

    # 2. Decode.
    steps: list[Step] = []
    trace = steps.extend if options.trace is not None else None
    note = None
    if options.prompts is None:
        generations = [answer(model, tokenizer, prompts[0], decoding, options.plain, options.stop, trace)]
    else:
        identity = _identity(options, model, tokenizer, decoding, prompts)
        with collect(options.out, requests, identity) as results:
            rows = [row for row in range(len(prompts)) if row not in results.done]
            if kept := len(prompts) - len(rows):
                note = f"{kept} of {len(prompts)} results are from an interrupted run"
                print(f"{note}; {len(rows)} remain", file=sys.stderr)
            generations = _decode_rows(rows, results, prompts, tokenizer, model, decoding, options, trace)
        requests = [requests[row] for row in rows]

    # 3. Report.
    if options.trace is not None and not generations:
        print(f"--trace {options.trace} was not written: no prompt had to be decoded", file=sys.stderr)
    elif options.trace is not None:
        texts = [request.prompt for request in requests]
        page = trace_page(options.model, decoding, tokenizer, model.config, texts, generations, steps, note)
        write_atomically(options.trace, page)
        print(f"Replay of the decoding: {options.trace}", file=sys.stderr)


def _decode_rows(
    rows: list[int],
    results: Results,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: DiffusionTransformer,
    decoding: DecodingConfig,
    options: argparse.Namespace,
    trace: display.Observer | None,
) -> list[Generation]:
    """Decode the prompts at the indices `rows` into `results`, with progress and totals on stderr."""
    if not rows:
        return []
    rows_together: set[int] = set()  # may be fewer than `batch_size` if memory is short

    def count_rows(forward: list[Step]) -> None:
        rows_together.add(len(forward))

    with display.progress(sys.stderr, len(prompts), len(prompts) - len(rows)) as count:

        def keep(place: int, generation: Generation) -> None:
            response = text_of(generation, tokenizer, model.config, options.stop)
            results.add(rows[place], Result(response, generation.nfe, generation.num_tokens))
            count()

        observe = display.combine(count_rows, trace)
        wanted = [prompts[row] for row in rows]
        stop = stop_at(tokenizer, options.stop)
        generations, seconds = timed_generate(
            model, wanted, decoding, options.batch_size, observe, keep, stop
        )
    together = max(rows_together)
    shown = display.statistics(generations, seconds, model.device, together, decoding.compile)
    print(shown, file=sys.stderr)
    return generations


def _identity(
    options: argparse.Namespace,
    model: DiffusionTransformer,
    tokenizer: PreTrainedTokenizerBase,
    decoding: DecodingConfig,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """Everything that determines the results; an interrupted run is continued only if it is equal."""
    parts = [_files_digest(checkpoint_folder(options.model), "config.json")]
    if options.adapter is not None:
        parts.append(_files_digest(checkpoint_folder(options.adapter), "adapter_config.json"))
    return {
        "dparallel": version("dparallel"),
        "model": parts[0] if len(parts) == 1 else digest(parts),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "prompts": digest(prompts),
        "stop": options.stop,
        **decoding.model_dump(mode="json"),
    }


def _files_digest(folder: Path, config: str) -> str:
    """Digest of a folder's path and of the sizes and times of its weights and of its config file."""
    files = [*folder.glob("*.safetensors"), *folder.glob(config)]
    status = {
        file.relative_to(folder).as_posix(): (file.stat().st_size, file.stat().st_mtime_ns) for file in files
    }
    return digest([str(folder.resolve()), status])
