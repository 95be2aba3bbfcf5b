"""`python -m tasks.tracking upload [FOLDER]`: upload runs recorded while MLflow was not available."""

import argparse
import logging
import sys
from pathlib import Path

from dparallel.stages.streams import set_encodings
from tasks.tracking.upload import log, upload


def main() -> None:
    """Upload pending records; exits with an error if some remain."""
    set_encodings()
    parser = argparse.ArgumentParser(prog="python -m tasks.tracking", description=__doc__)
    parser.add_argument("command", choices=["upload"])
    parser.add_argument(
        "folder", nargs="?", default="runs", help="folder to search for records (default: runs)"
    )
    parser.add_argument("--all", action="store_true", help="also close runs of other hosts as killed")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    if not Path(arguments.folder).is_dir():
        print(f"error: {arguments.folder}: no such folder (looked in {Path.cwd()})", file=sys.stderr)
        sys.exit(2)
    failures = upload(arguments.folder, arguments.all)
    if failures:
        sys.exit("still pending:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
