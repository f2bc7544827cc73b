"""Loader processes: they read a rank's steps and build its batches; their start, their messages, and their end.

The rank has a connection to each process, over which steps arrive and requests for more are sent. A process that fails
sends the error in place of a step. The death of a process is a packet on its connection, and the death of the rank ends
the connection, so neither side waits for the other in vain.
"""

import atexit
import os
import selectors
import signal
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import pyarrow as pa
import torch

from bigdssm.dataset.blocks import BadRow
from bigdssm.dataset.rows import Rows
from bigdssm.errors import BigDSSMError, DataError, PeerError
from bigdssm.loader.fork_server import EXITED, ForkServer
from bigdssm.loader.messages import Message, receive
from bigdssm.utils.log import get_logger, setup_logging

T = TypeVar("T")
STEPS_AHEAD = 4  # prefetched steps, at least; two per process
MORE = b"more"  # a request for a further step
log = get_logger(__name__)
fork_server = ForkServer(f"{__name__}:run_loader")
atexit.register(fork_server.stop)


@dataclass(frozen=True)
class LoadedStep(Generic[T]):
    """The rows of some lanes in one step, or the value built from them; the bad rows read since the last step."""

    step: int
    value: T
    rows_planned: int  # including bad rows
    rows_skipped: int
    targets_skipped: int = 0  # bad targets of rows with other, good ones
    bad: list[BadRow] = field(default_factory=list)


class Peers:
    """The number of this loader process, and the parts of steps that the rank's processes send to each other."""

    def __init__(self, process: int = 0, inboxes: list[socket.socket] | None = None) -> None:
        """`inboxes`: a socket per process, None without processes; that of this one receives, the others send."""
        self.process = process
        self.processes = len(inboxes or [None])
        self._inboxes = inboxes or []
        self._received: list[SimpleQueue[Message | OSError]] = [SimpleQueue() for _ in self._inboxes]
        if self.processes > 1:
            # received at once: senders never wait, so processes cannot wait for each other in a circle
            threading.Thread(target=self._receive_all, daemon=True).start()

    def send(self, process: int, part: Any) -> None:
        """Send a part to a process. Raises PicklingError, TypeError or AttributeError: it cannot be pickled."""
        with closing(Message.of(part, self.process)) as message:
            message.send(self._inboxes[process])

    def send_error(self, text: str) -> None:
        """Send an error of this process to all others, after the parts that they still need."""
        for process in range(self.processes):
            if process != self.process:
                with suppress(OSError):  # the process has ended
                    self.send(process, text)

    def receive(self, process: int) -> Any:
        """Wait for the next part from a process. Raises DataError: the error of that process.

        The rank observes the processes, and ends this one if another one dies.
        """
        message = self._received[process].get()
        if isinstance(message, OSError):
            raise message
        part = message.read()
        if isinstance(part, str):
            raise DataError(part)
        return part

    def _receive_all(self) -> None:
        try:
            while True:
                message = receive(self._inboxes[self.process])
                self._received[message.label].put(message)
        except EOFError:
            pass  # the others have ended
        except OSError as error:
            for received in self._received:
                received.put(error)


class WorkerSteps(ABC, Generic[T]):
    """The steps of a rank; subclasses implement `read`."""

    def __init__(self, make: Callable[[Rows], T]) -> None:
        """`make` is called in the process that has read the step."""
        self._make = make

    @property
    def modules(self) -> list[str]:
        """The modules of the package that a loader process needs."""
        names = [type(self).__module__, self._make.__module__]
        return [name for name in names if name.startswith("bigdssm.")]

    @abstractmethod
    def read(self, peers: Peers) -> Iterator[LoadedStep[Rows]]:
        """Yield the steps at the indices `peers.process`, `peers.process` + `peers.processes`, …."""

    def load(self, peers: Peers) -> Iterator[LoadedStep[T]]:
        """Yield the steps of a process with the values built from their rows."""
        for step in self.read(peers):
            value = self._make(step.value)
            yield LoadedStep(step.step, value, step.rows_planned, step.rows_skipped, step.targets_skipped, step.bad)


def load(steps: WorkerSteps[T], num_workers: int) -> Generator[LoadedStep[T]]:
    """Yield the steps in order, read by `num_workers` processes (0: this one). Close it to end them.

    Raises DataError: reading failed; PeerError: a process died.
    """
    with ExitStack() as stack:
        loaded: Iterator[LoadedStep[T] | str] = until_an_error(steps.load(Peers()))
        if num_workers:
            loaded = stack.enter_context(closing(_Loaders(steps, num_workers))).steps()
        for step in loaded:
            if isinstance(step, str):
                raise DataError(step)
            yield step


def until_an_error(items: Iterator[T]) -> Iterator[T | str]:
    """Yield the items; on an error, yield its message instead of raising, so that all ranks can stop together."""
    try:
        yield from items
    except Exception as error:
        yield _described(error)


def _described(error: Exception) -> str:
    """Return the text of an error; an unexpected one is also logged with its traceback."""
    if isinstance(error, BigDSSMError):
        return str(error)
    log.error("reading failed", exc_info=error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Loaders:
    """The loader processes of a rank."""

    def __init__(self, steps: WorkerSteps[Any], num: int) -> None:
        """Start `num` processes. Raises PicklingError, TypeError or AttributeError: `steps` cannot be pickled."""
        self._connections: list[socket.socket] = []
        self._pids: list[int] = []
        self._received: list[deque[Message]] = [deque() for _ in range(num)]
        self._selector = selectors.DefaultSelector()
        ahead = max(2, -(-STEPS_AHEAD // num))
        environment = dict(os.environ), os.getcwd(), sys.path
        with ExitStack() as stack:
            state = stack.enter_context(closing(Message.of(environment)))
            pickled_steps = stack.enter_context(closing(Message.of(steps, by_value=True)))
            inboxes = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(num)]
            for receiving, sending in inboxes:
                stack.enter_context(receiving)
                stack.enter_context(sending)
            try:
                for process in range(num):
                    connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    self._connections.append(connection)
                    self._selector.register(connection, selectors.EVENT_READ, process)
                    with theirs:
                        self._pids.append(fork_server.fork(theirs, steps.modules))
                    state.send(connection)
                    pickled_steps.send(connection)
                    connection.send(f"{process} {num} {ahead}".encode())
                    for receiver, (receiving, sending) in enumerate(inboxes):
                        end = receiving if receiver == process else sending
                        socket.send_fds(connection, [b"inbox"], [end.fileno()])
            except OSError as error:  # the process has ended
                self.close()
                raise PeerError(f"a loader process ended at its start: {error}") from None
            except BaseException:
                self.close()
                raise

    def steps(self) -> Iterator[Any]:
        """Yield the steps of the processes in turn; the message of an error is the last item."""
        turn = 0
        while True:
            while not self._received[turn]:
                if self._connections[turn].fileno() < 0:
                    return  # it has sent its last step
                for key, _ in self._selector.select():
                    self._receive(key.data)
            message = self._received[turn].popleft()
            with suppress(OSError):  # the process has ended
                self._connections[turn].send(MORE)
            yield message.read()
            turn = (turn + 1) % len(self._received)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for messages in self._received:
            while messages:
                messages.pop().close()
        self._selector.close()

    def _receive(self, process: int) -> None:
        """Receive a step of a process, or its end. Raises PeerError: it died."""
        connection = self._connections[process]
        try:
            self._received[process].append(receive(connection))
            return
        except EOFError as end:
            last = str(end)
        self._selector.unregister(connection)
        connection.close()
        died = f"a loader process died: pid {self._pids[process]}"
        if not last.startswith(EXITED):
            raise PeerError(f"{died}, and the fork server before it")
        code = int(last.removeprefix(EXITED))
        if code:
            reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            raise PeerError(f"{died} {reason}")


def run_loader(connection: socket.socket) -> None:
    """Read and send the steps of one process, until they or the rank have ended; called by the fork server."""
    try:
        states = receive(connection), receive(connection)
    except EOFError:
        return  # the rank has closed the connection
    process, num, ahead = map(int, connection.recv(64).split())
    inboxes = [socket.socket(fileno=socket.recv_fds(connection, 64, 1)[1][0]) for _ in range(num)]
    requests = threading.Semaphore(ahead)

    def receive_requests() -> None:
        with suppress(OSError):
            while connection.recv(64):
                requests.release()
        os._exit(0)  # the rank has closed the connection, or ended

    def messages() -> Iterator[Message]:
        for step in _restore(states).load(peers):
            yield Message.of(step)

    threading.Thread(target=receive_requests, daemon=True).start()
    peers = Peers(process, inboxes)
    for item in until_an_error(messages()):
        if isinstance(item, str):
            peers.send_error(item)
        requests.acquire()
        with closing(Message.of(item) if isinstance(item, str) else item) as message, suppress(BrokenPipeError):
            message.send(connection)


def _restore(states: tuple[Message, Message]) -> WorkerSteps[Any]:
    """Set the environment of the rank, and one core for libraries; return its steps."""
    environment, folder, path = states[0].read(shared=True)
    os.environ.clear()
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")
    os.chdir(folder)
    sys.path[:] = path
    setup_logging()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    steps: WorkerSteps[Any] = states[1].read(shared=True)  # imports what it needs
    return steps
