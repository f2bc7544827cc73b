"""A process without threads that forks loader processes.

Threads and CUDA do not survive a fork, and a rank has both. The server is a new interpreter that imports the modules of
the loader processes once, with libraries' thread pools disabled, and forks a process per request.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module

# of the server: numpy's and pyarrow's libraries start threads when they are imported
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "TOKENIZERS_PARALLELISM": "false",
}
COMMAND = (
    "import json, sys; _, control, entry, path, modules = sys.argv; sys.path[:] = json.loads(path); "
    f"from {__name__} import serve; serve(int(control), entry, json.loads(modules))"
)
MODULES = ("pandas",)  # pyarrow imports it where it is installed
EXITED = "exit "  # a packet of the server on the connection of a process that has ended
SIGNALS = {signal.SIGINT, signal.SIGTERM}  # launchers and terminals send them to whole process groups


class ForkServer:
    """The fork server of this process; started by the first `fork`, or in advance by `start`."""

    def __init__(self, entry: str) -> None:
        """`entry`: the module:function that a forked process calls with its connection."""
        self._entry = entry
        self._lock = threading.Lock()
        self._owner = 0  # pid: a fork of this process has no server
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self, modules: Iterable[str] = ()) -> None:
        """Start the server unless it runs; it imports `modules` first. Returns at once."""
        with self._lock:
            self._start(modules)

    def fork(self, connection: socket.socket, modules: Iterable[str] = ()) -> int:
        """Return the pid of a new process that has `connection`; its signals SIGINT and SIGTERM are blocked.

        The server imports `modules` before, once. When the process has ended, the peer of `connection` receives EXITED
        with the exit code (negative: a signal).
        """
        modules = list(modules)
        with self._lock:
            for _ in range(2):  # the server may have been killed since the last request
                control = self._start(modules)
                with suppress(OSError):
                    socket.send_fds(control, [json.dumps(modules).encode()], [connection.fileno()])
                    if reply := control.recv(64):
                        return int(reply)
                self._stop()
        raise RuntimeError("the fork server of the loader processes has ended; its error is above")

    def stop(self) -> None:
        """End the server; loader processes continue until their connections are closed."""
        with self._lock:
            self._stop()

    def _start(self, modules: Iterable[str]) -> socket.socket:
        if self._control is not None and self._owner == os.getpid():
            return self._control
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = [str(theirs.fileno()), self._entry, json.dumps(sys.path), json.dumps([*MODULES, *modules])]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *options],
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._control = control
        self._owner = os.getpid()
        return control

    def _stop(self) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            if self._owner == os.getpid():
                self._process.kill()
                self._process.wait()
        self._control = self._process = None


def serve(control_file: int, entry: str, modules: list[str]) -> None:
    """Fork a process per request, and report ends of processes, until the peer of the control socket has ended."""
    control = socket.socket(fileno=control_file)
    _import([entry.partition(":")[0], *modules])
    ended, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    connections: dict[int, socket.socket] = {}  # by pid
    while True:
        readable, _, _ = select.select([control, ended], [], [])
        if ended in readable:
            ended.recv(4096)
            for pid in list(connections):
                number, status = os.waitpid(pid, os.WNOHANG)
                if number:
                    with connections.pop(pid) as connection, suppress(OSError):  # nobody waits for it
                        code = os.waitstatus_to_exitcode(status)
                        connection.send(f"{EXITED}{code}".encode(), socket.MSG_DONTWAIT)
        if control in readable:
            request, files, _, _ = socket.recv_fds(control, 1 << 16, 1)
            if not request:
                return
            connection = socket.socket(fileno=files[0])
            _import(json.loads(request))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (control, ended, wakeup, *connections.values()):
                    other.close()
                _run(connection, entry)
            connections[pid] = connection
            with suppress(OSError):
                control.send(str(pid).encode())


def _import(modules: list[str]) -> None:
    """Import modules that exist; a forked process raises the errors of those that it needs."""
    for module in modules:
        if module not in sys.modules:
            with suppress(Exception):
                import_module(module)
            threads = len(os.listdir("/proc/self/task"))
            if threads > 1:
                warnings.warn(f"loader processes are forked from {threads} threads since {module}", stacklevel=1)


def _run(connection: socket.socket, entry: str) -> None:
    """Call `entry` in the new process, and end it."""
    code = 1
    try:
        module, _, function = entry.partition(":")
        getattr(import_module(module), function)(connection)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
