"""The databases of the servers are opened first: servers try for minutes before they give up."""

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path

import asyncpg

from deploy.local.settings import FILE, SettingsError

SECONDS = 10.0
DRIVER = re.compile(r"^(postgresql|sqlite)\+\w+://")


def check(urls: Mapping[str, str], root: Path) -> None:
    """Open the databases.

    Args:
        urls: addresses by the name of their setting; empty ones are not checked.

    Raises:
        SettingsError: one cannot be opened.
    """
    for setting, url in urls.items():
        plain = DRIVER.sub(r"\1://", url)
        if plain.startswith("sqlite:///"):
            file = root / plain.removeprefix("sqlite:///")
            if not os.access(file if file.exists() else file.parent, os.W_OK):
                raise SettingsError(f"{setting}: {file} cannot be written; change it in {FILE}")
        elif plain.startswith("postgresql://"):
            try:
                asyncio.run(_connect(plain))
            except (
                OSError,
                TimeoutError,
                ValueError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
            ) as error:
                if isinstance(error, ValueError | asyncpg.InterfaceError):  # its text may hold the password
                    raise SettingsError(
                        f"{setting}: is no address of a database: give the port as a number, and write "
                        "special characters of user and password as %2F for /, %40 for @, %23 for #, "
                        f"%3F for ?; change it in {FILE}"
                    ) from None
                where = plain.rpartition("@")[2].partition("?")[0] or "the database"  # without the password
                why = str(error) or type(error).__name__
                raise SettingsError(
                    f"{setting}: {where} cannot be opened ({why}); start PostgreSQL, create the database, or "
                    f"change it in {FILE}"
                ) from None


async def _connect(url: str) -> None:
    connection = await asyncpg.connect(url, timeout=SECONDS)
    await connection.close()
