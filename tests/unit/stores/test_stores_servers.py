"""Servers of stores: verified TLS, passwords, full disks, and a stop in the middle of a publication."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from bigdssm.commands import publish as publish_command
from bigdssm.errors import BigDSSMError, UnavailableError
from bigdssm.retrieval import publish as publishing
from bigdssm.retrieval.publish import publish
from bigdssm.stores.base import Store, open_store
from tests.postgres import Server, check_installed
from tests.unit.stores.shop import Shop, state

HOST, OTHER_HOST = "127.0.0.2", "127.0.0.3"  # of this machine, and not local by name
PASSWORD = "hidden-5f2c-word"


def new_certificate(folder: Path, name: str, *options: str) -> None:
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
    ]
    command += ["2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def tls_server() -> Iterator[tuple[Server, str, str]]:
    """Yield a server for encrypted connections with a password only, its options, and the base of its URLs."""
    check_installed()
    server = Server()
    try:
        for name in ("ca", "another"):
            new_certificate(server.folder, name)
        signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", f"subjectAltName=IP:{HOST}"]
        new_certificate(server.folder, "server", *signed, "-addext", "basicConstraints=critical,CA:false")
        for name in ("server.key", "server.crt"):
            (server.folder / name).chmod(0o600)
            if server._user:
                shutil.chown(server.folder / name, "postgres", "postgres")
        with socket.socket() as free:
            free.bind((HOST, 0))
            port = free.getsockname()[1]
        rules = "local all postgres trust\nhostssl all clerk all scram-sha-256\n"
        (server.folder / "data/pg_hba.conf").write_text(rules)
        files = f"-c ssl_cert_file={server.folder}/server.crt -c ssl_key_file={server.folder}/server.key"
        options = f"-c listen_addresses={HOST},{OTHER_HOST} -c port={port} -c ssl=on {files}"
        server.start(options)
        with psycopg.connect(f"{server.url('postgres')}&port={port}", autocommit=True) as connection:
            connection.execute("CREATE DATABASE shop")
            connection.execute(f"CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'")
            connection.execute("ALTER DATABASE shop OWNER TO clerk")
        with psycopg.connect(f"{server.url('shop')}&port={port}", autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        yield server, options, f"postgresql://clerk@{HOST}:{port}/shop"
    finally:
        server.stop("immediate")
        shutil.rmtree(server.folder)


@pytest.mark.parametrize(
    ("host", "query", "reason"),
    [
        (HOST, "", "certificate verify failed"),
        (HOST, "?sslrootcert={folder}/another.crt", "certificate verify failed"),
        (OTHER_HOST, "?sslrootcert={folder}/ca.crt", f'does not match host name "{OTHER_HOST}"'),
        (HOST, "?sslmode=disable", "no encryption"), (HOST, "?sslrootcert={folder}/ca.crt", ""),
        (OTHER_HOST, "?sslmode=require", ""),
    ],
)  # fmt: skip
def test_a_server_is_verified(
    tls_server: tuple[Server, str, str], host: str, query: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, base = tls_server
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    store: Any = open_store(base.replace(HOST, host) + query.format(folder=server.folder))
    if reason:
        with pytest.raises(UnavailableError) as caught:
            store.collections()
        assert reason in str(caught.value) and "\n" not in str(caught.value) and PASSWORD not in str(caught.value)
    else:
        assert store.collections() == {}
        assert store._select("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") == [(True,)]


def test_a_password_stands_nowhere(
    tls_server: tuple[Server, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server, options, base = tls_server
    url = f"{base}?sslrootcert={server.folder}/ca.crt"
    monkeypatch.setenv("PGPASSWORD", f"not-{PASSWORD}")
    assert publish_command.main(["--to", url]) == UnavailableError.exit_code
    assert 'password authentication failed for user "clerk"' in capfd.readouterr().err.replace("\n", " ")
    monkeypatch.delenv("PGPASSWORD")
    assert publish_command.main(["--to", url]) == UnavailableError.exit_code
    assert "no password supplied" in capfd.readouterr().err
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"*:*:shop:clerk:{PASSWORD}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    store = open_store(url)
    folder, dataset = Shop.new(Random(0), 30).save(tmp_path / "v")
    collection = publish(store, folder, dataset, "shop").collection
    assert publish_command.main(["--to", url]) == 0
    out, error = capfd.readouterr()
    assert "shop: 30 documents" in out
    server.stop("fast")  # writes all pages
    try:
        shown = [out, error, repr(store), repr(collection), (server.folder / "log").read_text()]
        shown += [
            file.read_text("latin-1")
            for file in (*folder.rglob("*"), *(server.folder / "data").rglob("*"))
            if file.is_file()
        ]
        assert not [text[:80] for text in shown if PASSWORD in text]
    finally:
        server.start(options)


# ----- full disks and stops


def mounted(folder: Path, megabytes: int) -> bool:
    """Mount a small disk, or return False where that is not permitted."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", str(folder)]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@pytest.mark.slow
def test_a_publication_continues_when_a_full_disk_has_space_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed()
    monkeypatch.setattr(publishing, "ROWS_AT_ONCE", 500)
    disk = Path("/tmp") / f"disk{time.time_ns()}"
    if not mounted(disk, 64):
        pytest.skip("needs the right to mount")
    server = Server(disk)
    try:
        server.start("-c listen_addresses= -c min_wal_size=32MB -c max_wal_size=32MB")
        store, saved = open_store(server.url("postgres")), Shop.new(Random(0), 6000).save(tmp_path / "v")
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - (1 << 20)))
        with pytest.raises(UnavailableError) as caught:
            publish(store, *saved, "shop")
        assert "No space left on device; try again when this is fixed" in str(caught.value)
        assert "\n" not in str(caught.value)
        before = store.count(store.collections()["shop"])
        assert 0 < before < 6000 and not store.collections()["shop"].published
        subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
        report = publish(store, *saved, "shop")
        assert report.unchanged == before and report.written == 6000 - before
        assert state(store, report.collection) == state(store, publish(store, *saved, "rebuilt").collection)
    finally:
        server.stop("immediate")
        subprocess.run(["umount", "-l", str(disk)], check=True)
        disk.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["writing", "indexing"])
def test_a_server_that_stops_in_the_middle_of_a_publication(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restarts, the publication ends, and the collection equals the folder."""
    check_installed()
    monkeypatch.setattr(publishing, "ROWS_AT_ONCE", 50)
    server, results = Server(), []
    try:
        server.start()
        store, saved = open_store(server.new_database()), Shop.new(Random(0), 2000).save(tmp_path / "v")

        def work() -> None:
            try:
                results.append(publish(store, *saved, "shop"))
            except BigDSSMError as error:
                results.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        with psycopg.connect(store.url, autocommit=True) as connection:
            while thread.is_alive():
                with suppress(psycopg.Error):
                    written = connection.execute('SELECT count(*) FROM "bigdssm_vectors_shop"').fetchone()
                    building = connection.execute("SELECT count(*) FROM pg_stat_progress_create_index").fetchone()
                    assert written is not None and building is not None
                    if (written[0] >= 400) if phase == "writing" else building[0]:
                        break
        assert thread.is_alive(), "stopped in the middle"
        server.stop("immediate")
        time.sleep(0.5)
        server.start()
        thread.join()
        (result,) = results
        assert not isinstance(result, BigDSSMError), result
        again: Store = open_store(store.url)
        assert publish(again, *saved, "shop").unchanged == 2000
        assert state(again, again.collection("shop")) == state(again, publish(again, *saved, "rebuilt").collection)
    finally:
        server.stop("immediate")
        shutil.rmtree(server.folder)
