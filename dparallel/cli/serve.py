"""`dparallel serve`: answer OpenAI's requests over HTTP."""

import argparse
import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dparallel.cli.model import open_decoding, open_model, open_tokenizer
from dparallel.config.base import ConfigError
from dparallel.decoding.generate import LengthError, check_prompts
from dparallel.models.commit_rule import check_commit_rule

if TYPE_CHECKING:
    from dparallel.serving.engine import Served

LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")
KEY = "DPARALLEL_API_KEY"


def serve(options: argparse.Namespace) -> None:
    """Load the models and serve them until SIGTERM or Ctrl-C.

    Raises:
        UserError: an option, a model or the address cannot be used, or the web libraries are missing.
    """
    # 1. Check everything, first what does not need the weights.
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} is not installed: pip install 'dparallel[serve]'")
    from dparallel.serving.app import build_app
    from dparallel.serving.engine import Engine, Served
    from dparallel.serving.limits import Limits
    from dparallel.serving.server import address_of, bound_socket, is_loopback, run

    given = {name: getattr(options, name) for name in Limits.model_fields if hasattr(options, name)}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    template, key = _read(options.chat_template, "--chat-template"), _key(options.api_key_file)
    names = _names(options.model, options.served_name)
    if options.adapter is not None and len(names) > 1:
        raise ConfigError(
            f"--adapter {options.adapter} with {len(names)} models: serve it with its own alone"
        )
    of_model = {name: argparse.Namespace(**{**vars(options), "model": path}) for name, path in names.items()}
    decodings = {name: open_decoding(of_one) for name, of_one in of_model.items()}
    if any(decoding.compile for decoding in decodings.values()):
        raise ConfigError("--compile with dparallel serve: its batches have no fixed sizes; drop it")
    with bound_socket(options.host, options.port) as listening:  # before the weights are read
        # 2. Load.
        models = {}
        for name, of_one in of_model.items():
            models[name] = Served(name, open_model(of_one), open_tokenizer(of_one), decodings[name])
            _check(models[name])
        if key is None and not is_loopback(options.host):
            print(f"Anyone who reaches {options.host} can use this server: set {KEY}", file=sys.stderr)

        # 3. Serve.
        def ready() -> None:
            address = address_of(listening)
            print(f"Serving {', '.join(names)} on {address}/v1", file=sys.stderr)
            print(f"Chat with them in a browser: {address}/", file=sys.stderr, flush=True)

        engine = Engine(models, limits.batch_size, limits.queue)
        app = build_app(engine, limits, key, template, is_loopback(options.host))
        run(app, listening, limits, ready)
    print("All accepted requests are answered.", file=sys.stderr)


def _check(served: "Served") -> None:
    """Raise a UserError if the model cannot be decoded as requests are that do not choose."""
    check_commit_rule(served.decoding, served.model.commit_rule)
    with contextlib.suppress(LengthError):  # requests get the longest response that fits
        check_prompts(served.model, [], served.decoding)


def _names(paths: list[str], given: list[str]) -> dict[str, str]:
    """The checkpoints by the names under which requests know them: by default that of the folder."""
    if given and len(given) != len(paths):
        raise ConfigError(f"{len(given)} --served-name for {len(paths)} --model: give one for each, or none")
    names = given or [Path(path).name or path for path in paths]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(f"two models are called {name!r}: name each with --served-name")
    return dict(zip(names, paths, strict=True))


def _key(file: Path | None) -> str | None:
    """The API key; from a file or the environment, since other users can read a command line."""
    key = _read(file, "--api-key-file") if file is not None else os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ConfigError(f"{file or KEY} holds no key: write one, or leave it out")
    return None if key is None else key.strip()


def _read(file: Path | None, flag: str) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {file}: {error}") from error
