"""A private PostgreSQL server with pgvector for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

BINARIES = Path("/usr/lib/postgresql/17/bin")  # Debian's postgresql-17
EXTENSION = Path("/usr/share/postgresql/17/extension/vector.control")  # postgresql-17-pgvector


class Server:
    """A cluster in a folder of its own, on a Unix socket."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pg")) if folder is None else folder
        self._user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if self._user:  # the server refuses root
            shutil.chown(self.folder, "postgres", "postgres")
        self._run(
            "initdb", "-D", "data", "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"
        )
        self.databases = 0

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(BINARIES / program), *arguments]
        with (self.folder / "log").open("ab") as log:
            subprocess.run(command, cwd=self.folder, check=True, stdout=log, stderr=log, **self._user)  # type: ignore[call-overload]

    def start(self, options: str = "-c listen_addresses= -c max_wal_size=4GB") -> None:
        options = f"-k {self.folder} -c fsync=off {options}"
        self._run("pg_ctl", "-D", "data", "-o", options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-D", "data", "-m", mode, "-w", "stop")

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Create a database and return its URL."""
        self.databases += 1
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE test{self.databases}")
        return self.url(f"test{self.databases}")


def check_installed() -> None:
    """Skip the test, or with --full fail it, if PostgreSQL is not installed."""
    if not (BINARIES / "initdb").exists() or not EXTENSION.exists():
        give_up = pytest.fail if "BIGDSSM_FULL" in os.environ else pytest.skip
        give_up("needs PostgreSQL 17 with pgvector: apt-get install postgresql-17-pgvector")


def running_server() -> Iterator[Server]:
    """Yield a server."""
    check_installed()
    server = Server()
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(server.folder)
