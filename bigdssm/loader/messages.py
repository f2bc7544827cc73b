"""Objects sent between processes: pickles in shared memory, as file descriptors over Unix sockets.

A message is one packet with one file descriptor, so it arrives whole or not at all: a process that is killed while it
sends leaves neither a part of a message nor a locked queue. An object is pickled in the thread that sends it, so what
cannot be pickled raises there.
"""

import io
import mmap
import os
import pickle
import socket
from types import MethodType
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line
MAX_PACKET = 1 << 16


class Message(NamedTuple):
    """A pickled object in a memory file, whose descriptor the holder of the message closes."""

    file: int
    label: Any  # small: part of the packet
    sizes: tuple[int, ...]  # bytes of the pickle and of each array, which begin at multiples of ALIGNMENT

    @classmethod
    def of(cls, value: Any, label: Any = None, *, by_value: bool = False) -> "Message":
        """Pickle `value`. `by_value`: also functions and classes that the receiver cannot import.

        Raises PicklingError, TypeError or AttributeError: a part cannot be pickled; OSError: no memory.
        """
        content = io.BytesIO()
        buffers: list[memoryview] = []
        pickler = (_StatePickler if by_value else _TensorPickler)(
            content, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw())
        )
        pickler.dump(value)
        parts = [content.getbuffer(), *buffers]
        message = cls(os.memfd_create("bigdssm"), label, tuple(part.nbytes for part in parts))
        try:
            starts, end = message._extent()
            os.ftruncate(message.file, end)
            for start, part in zip(starts, parts, strict=True):
                done = 0
                while done < part.nbytes:
                    done += os.pwrite(message.file, part[done:], start + done)
        except BaseException:
            message.close()
            raise
        return message

    def send(self, receiver: socket.socket) -> None:
        """Send the message; it may be sent to several receivers. Raises OSError: there is no receiver."""
        socket.send_fds(receiver, [pickle.dumps((self.label, self.sizes))], [self.file])

    def read(self, *, shared: bool = False) -> Any:
        """Return the object, whose arrays are views of the file, and close the file.

        `shared`: other processes read the same message; an array that this one changes remains as it was for them.
        """
        starts, end = self._extent()
        flags = mmap.MAP_PRIVATE if shared else mmap.MAP_SHARED | mmap.MAP_POPULATE
        try:
            view = memoryview(mmap.mmap(self.file, end, flags))
        finally:
            self.close()
        content, *buffers = (view[start : start + size] for start, size in zip(starts, self.sizes, strict=True))
        return pickle.loads(content, buffers=buffers)

    def close(self) -> None:
        """Close the file; views of it remain valid."""
        os.close(self.file)

    def _extent(self) -> tuple[list[int], int]:
        """Return where each part begins, and the size of the file."""
        starts = []
        end = 0
        for size in self.sizes:
            starts.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return starts, end


def receive(sender: socket.socket) -> Message:
    """Wait for the next message. Raises OSError: too many open files; EOFError with a packet that is no message.

    The packet is empty if the sender has ended.
    """
    try:
        packet, files, flags, _ = socket.recv_fds(sender, MAX_PACKET, 1)
    except ConnectionResetError:  # once, if the sender has ended with unread requests; its packets can still be read
        packet, files, flags, _ = socket.recv_fds(sender, MAX_PACKET, 1)
    if flags & socket.MSG_CTRUNC:
        raise OSError("a message could not be received: too many open files; raise the limit (ulimit -n)")
    if not files:
        raise EOFError(packet.decode())
    label, sizes = pickle.loads(packet)
    return Message(files[0], label, sizes)


class _TensorPickler(pickle.Pickler):
    """Pickles tensors as arrays."""

    def reducer_override(self, value: Any) -> Any:
        return _reduce_tensor(value) if type(value) is Tensor else NotImplemented


class _StatePickler(cloudpickle.Pickler):
    """Pickles tensors as arrays, and memory-mapped arrays as their place in the file."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            return _reduce_tensor(value)
        if isinstance(value, np.memmap) and value.flags.c_contiguous and value.size:
            return _reduce_memmap(value)
        if isinstance(value, MethodType):
            return value.__reduce__()  # by its name, unlike cloudpickle, which copies a decorated classmethod
        return super().reducer_override(value)


def _reduce_tensor(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.detach().numpy(),)


def _reduce_memmap(array: np.memmap) -> tuple[Any, ...]:
    # `array.offset` is that of the array from which this one may be a slice
    mapped_from = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    mapped_at = np.frombuffer(array._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
    offset = mapped_from + array.ctypes.data - mapped_at
    return np.memmap, (array.filename, array.dtype, "r", offset, array.shape)
