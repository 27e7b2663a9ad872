"""The process that confined ones are forked from: torch is imported once, no candidate ever is."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from foveal.search.isolate import confine, worker
from foveal.search.isolate.channel import ChannelError, send


def main(control: int) -> None:
    """Forks a confined process for every request, until the other side goes away."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    confine.die_with_parent()
    with socket.socket(fileno=control) as requests:
        while True:
            content, handles, _, _ = socket.recv_fds(requests, 1 << 16, 2)
            if not content:
                return
            if os.fork() == 0:
                requests.close()
                _guard(json.loads(content), handles)
            for handle in handles:
                os.close(handle)


def _guard(request: dict[str, Any], handles: Sequence[int]) -> None:
    """Forks once more, into new namespaces, and lives as long as the confined process does."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    confine.die_with_parent()
    device = bool(request["limits"]["device"])
    layers = [confine.NAMESPACES] if confine.enter_namespaces(device) else []
    start, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(start, 1)
        os.close(start)
        _become(request, handles, layers)
    os.close(start)
    with socket.socket(fileno=handles[0]) as channel:
        send(channel, {"pid": pid})
        os.write(go, b"1")
        channel.detach()
    for handle in (*handles, go):
        os.close(handle)
    os.waitpid(pid, 0)
    os._exit(0)


def _become(request: dict[str, Any], handles: Sequence[int], layers: list[str]) -> None:
    """The confined process: gives up what it has, then serves the judge."""
    channel = socket.socket(fileno=handles[0])
    status = 1
    try:
        confine.die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        memory = mmap.mmap(handles[1], request["size"])
        os.close(handles[1])
        os.environ.clear()
        os.environ.update(request["environment"])
        writable = request["writable"]
        os.chdir(writable or "/")
        limits = confine.Limits(**request["limits"])
        layers += confine.confine(limits, request["readable"], writable)
    except Exception as error:
        send(channel, {"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    try:
        send(channel, {"ready": layers})
        worker.serve(channel, memory)
    except ChannelError:
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
