"""An upper bound on the decoded size of an Arrow stream, from its metadata without decompression.

A block of a few kilobytes may decode to terabytes (a decompression bomb). Arrow allocates the size in the first 8 bytes
of each compressed buffer, and zstd never writes more than that, so the sum of these sizes bounds the memory of
decoding.
"""

from __future__ import annotations

import struct

RECORD_BATCH = 3  # MessageHeader in Arrow's Message.fbs


class _Table:
    """A flatbuffer table; implements only the reading of offsets."""

    def __init__(self, data: memoryview, position: int) -> None:
        self.data, self.position = data, position
        self.vtable = position - _int32(data, position)

    def field(self, number: int) -> int:
        """Return the position of a field's value, 0 if the field is absent."""
        slot = 4 + 2 * number
        if slot >= _uint16(self.data, self.vtable):
            return 0
        offset = _uint16(self.data, self.vtable + slot)
        return self.position + offset if offset else 0

    def follow(self, number: int) -> int:
        """Return the target position of an offset field, 0 if the field is absent."""
        at = self.field(number)
        return at + _uint32(self.data, at) if at else 0


def max_decoded_size(stream: bytes) -> int:
    """Return an upper bound on the decoded bytes of an Arrow IPC stream's record batches.

    Raises ValueError: not an Arrow stream, or a stream with dictionaries (blocks have none).
    """
    data, position, total = memoryview(stream), 0, 0
    try:
        while position + 8 <= len(data):
            if _uint32(data, position) != 0xFFFFFFFF:
                raise ValueError("not an Arrow stream")
            length = _int32(data, position + 4)
            if length == 0:
                break
            start = position + 8
            message = _Table(data, start + _uint32(data, start))
            kind = data[message.field(1)] if message.field(1) else 0
            body = start + length
            if kind == RECORD_BATCH:
                total += _batch_size(data, _Table(data, message.follow(2)), body)
            elif kind != 1:
                raise ValueError("an Arrow stream with dictionaries; blocks have none")
            at = message.field(3)
            position = body + (_int64(data, at) if at else 0)
            if position < body:
                raise ValueError("not an Arrow stream")
    except (struct.error, IndexError):
        raise ValueError("not an Arrow stream, or a damaged one") from None
    return total


def _batch_size(data: memoryview, batch: _Table, body: int) -> int:
    buffers = batch.follow(2)
    compressed = batch.field(3) != 0
    total = 0
    for number in range(_uint32(data, buffers) if buffers else 0):
        at = buffers + 4 + 16 * number
        offset, length = _int64(data, at), _int64(data, at + 8)
        plain = _int64(data, body + offset) if compressed and length >= 8 else -1
        total += length if plain < 0 else plain
    return total


def _int32(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<i", data, at)[0])


def _uint32(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _uint16(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<H", data, at)[0])


def _int64(data: memoryview, at: int) -> int:
    return int(struct.unpack_from("<q", data, at)[0])
