"""Messages between a judge and a confined process: a length, then JSON; and tensors as raw bytes."""

from __future__ import annotations

import json
import mmap
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Message = dict[str, Any]
LONGEST = 1 << 20
"""Bytes of the longest message that is read."""
_TICK = 0.02


class ChannelError(Exception):
    """The other side is gone, is late, or does not speak the protocol."""


def send(channel: socket.socket, message: Message) -> None:
    """Writes one message whole."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack("!I", len(body)) + body)


def receive(
    channel: socket.socket,
    seconds: float | None = None,
    watch: Callable[[], None] = lambda: None,
) -> Message:
    """Reads one message; `watch` is called every 20 ms while there is none.

    Raises ChannelError when the other side ends, stays silent for `seconds`, or sends anything else.
    """
    end = None if seconds is None else time.monotonic() + seconds
    (length,) = struct.unpack("!I", _read(channel, 4, end, watch))
    if length > LONGEST:
        raise ChannelError("it sent a message that is too long")
    try:
        message = json.loads(_read(channel, length, end, watch))
    except (ValueError, RecursionError):
        raise ChannelError("it sent something that is no message") from None
    if not isinstance(message, dict):
        raise ChannelError("it sent something that is no message")
    return message


def _read(
    channel: socket.socket, length: int, end: float | None, watch: Callable[[], None]
) -> bytes:
    content = b""
    while len(content) < length:
        wait = None if end is None else max(min(_TICK, end - time.monotonic()), 0.0)
        ready = select.select([channel], [], [], wait)[0]
        if not ready:
            watch()
            if end is not None and time.monotonic() > end:
                raise ChannelError("it did not answer in time")
            continue
        try:
            piece = channel.recv(min(length - len(content), 1 << 16))
        except OSError:
            piece = b""
        if not piece:
            raise ChannelError("its process ended")
        content += piece
    return content


@dataclass(frozen=True)
class Region:
    """A tensor in shared memory: where it starts, in bytes, and how it is laid out, in elements."""

    offset: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None

    @staticmethod
    def of(message: Message) -> Region:
        """The inverse of `as_message`."""
        strides = message.get("strides")
        return Region(
            int(message["offset"]),
            tuple(message["shape"]),
            str(message["dtype"]),
            None if strides is None else tuple(strides),
        )

    def as_message(self) -> Message:
        return asdict(self)

    @property
    def elements(self) -> int:
        """Elements from the first to the last that the tensor touches."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return int(torch.Size(self.shape).numel())
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * step for size, step in steps)

    @property
    def nbytes(self) -> int:
        return self.elements * dtype_of(self.dtype).itemsize

    def view(self, memory: mmap.mmap) -> Tensor:
        """The tensor itself: writing to it writes to the memory."""
        if not self.elements:
            return torch.empty(self.shape, dtype=dtype_of(self.dtype))
        flat = torch.frombuffer(
            memory, dtype=dtype_of(self.dtype), count=self.elements, offset=self.offset
        )
        if self.strides is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.strides)


def dtype_of(name: str) -> torch.dtype:
    """ "float32" as a torch.dtype; ValueError for what is none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no element type")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like."""
    return str(dtype).removeprefix("torch.")


def regions(messages: Sequence[Message]) -> list[Region]:
    """Regions from their messages."""
    return [Region.of(each) for each in messages]
