"""MLflow's runs: `ui` shows them in a browser, `upload` uploads those recorded while it was not available."""

import logging
import os
import socket
import sys
from argparse import Namespace
from pathlib import Path

from dparallel.config.base import UserError
from dparallel.stages.arguments import Parser
from dparallel.stages.streams import set_encodings
from tasks.tracking import links
from tasks.tracking.records import anywhere, tracking_uri, without_password

STORES = ("sqlite://", "postgresql", "mysql", "mssql", "http://", "https://", "file://")


def main() -> None:
    """Run the command; a mistake of the user is one line and exit code 2."""
    set_encodings()
    parser = Parser(prog="python -m tasks.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    upload = commands.add_parser("upload", help="upload recorded runs")
    upload.add_argument(
        "folder", nargs="?", default="runs", help="folder to search for records (default: runs)"
    )
    upload.add_argument("--all", action="store_true", help="also close runs of other hosts as killed")
    ui = commands.add_parser("ui", help="show the runs of a store that has no server of its own")
    ui.add_argument("--store", help="URI of the store (default: MLFLOW_TRACKING_URI or mlflow.db here)")
    ui.add_argument("--port", type=int, default=links.PORT, help=f"port of the page (default: {links.PORT})")
    arguments = parser.parse_args()
    try:
        (_upload if arguments.command == "upload" else _ui)(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _upload(arguments: Namespace) -> None:
    """Upload pending records; exits with an error if some remain."""
    from tasks.tracking.upload import log, upload  # imports MLflow

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    if not Path(arguments.folder).is_dir():
        raise UserError(f"{arguments.folder}: no such folder (looked in {Path.cwd()})")
    failures = upload(arguments.folder, arguments.all)
    if failures:
        sys.exit("still pending:\n" + "\n".join(failures))


def _ui(arguments: Namespace) -> None:
    """Become MLflow's server, unless the store has one."""
    uri = anywhere(arguments.store) if arguments.store else tracking_uri()
    if "://" in uri and not uri.startswith(STORES):
        kinds = ", ".join(f"{kind}…" for kind in STORES)
        raise UserError(f"{without_password(uri)}: no store of MLflow; valid: a folder, {kinds}")
    if uri.startswith("http"):
        print(f"these runs have a server: {links.runs_page(links.server_of(uri))}")
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((links.HOST, arguments.port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {arguments.port} cannot be used ({error}): if `make up` runs, its page has the runs; "
                "otherwise give another port with --port"
            ) from error
    page = links.runs_page(f"http://{links.HOST}:{arguments.port}")
    print(f"{page}\n(ready after some 10 s; Ctrl-C ends it)", flush=True)
    command, environment = links.server_command(uri, arguments.port)
    os.execve(command[0], command, {**os.environ, **environment})


if __name__ == "__main__":
    main()
