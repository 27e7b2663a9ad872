"""The judge's side of confined processes: starts, asks, stops, watches and ends them."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import foveal
from foveal._errors import ConfinementError
from foveal.search.isolate.channel import ChannelError, Message, receive, send
from foveal.search.isolate.confine import LANDLOCK, NAMESPACES, SECCOMP, Limits

_SEALS = 0x2 | 0x4 | 0x1  # against shrinking, growing, and against removing the seals
_START = 120.0
_LONGEST_REASON = 1500
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "NVIDIA_VISIBLE_DEVICES")


class ProgramError(Exception):
    """A program raised, ended, hung or took more than it may: a sentence about it."""


class Nursery:
    """Starts confined processes; the first one costs an import of torch, the others a fork.

        with Nursery() as nursery, nursery.start() as process:
            process.ask({"do": "load", "program": {...}}, seconds=10)

    Raises ConfinementError where the system offers no way to confine a process.
    """

    def __init__(self) -> None:
        if not hasattr(socket, "recv_fds") or not hasattr(os, "memfd_create"):
            raise ConfinementError("confined processes need Linux")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        self._folder = Path(tempfile.mkdtemp(prefix="foveal-search-"))
        root = str(Path(foveal.__file__).parent.parent)
        code = (
            f"import sys; sys.path.insert(0, {root!r}); "
            f"from foveal.search.isolate.zygote import main; main({theirs.fileno()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            env=_environment(None),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def start(self, limits: Limits = Limits(), size: int = 1 << 30) -> Process:
        """A fresh confined process with `size` bytes of shared memory."""
        ours, theirs = socket.socketpair()
        handle = os.memfd_create("tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(handle, size)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
        writable = None
        if limits.programs or limits.device:
            writable = tempfile.mkdtemp(dir=self._folder)
        request = {
            "limits": dataclasses.asdict(limits),
            "size": size,
            "readable": _readable(),
            "writable": writable,
            "environment": _environment(writable),
        }
        try:
            socket.send_fds(
                self._control, [json.dumps(request).encode()], [theirs.fileno(), handle]
            )
            theirs.close()
            pid = int(receive(ours, _START)["pid"])
            answer = receive(ours, _START)
            if "error" in answer:
                raise ChannelError(str(answer["error"]))
            layers = answer["ready"]
        except (OSError, ChannelError) as error:
            raise ConfinementError(f"no confined process starts here: {error}") from None
        memory = mmap.mmap(handle, size)
        os.close(handle)
        return Process(ours, memory, pid, tuple(layers), limits, writable)

    def close(self) -> None:
        """Ends every process that was started."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Process:
    """One confined process.  `layers` are those in force, `memory` is shared with it."""

    def __init__(
        self,
        channel: socket.socket,
        memory: mmap.mmap,
        pid: int,
        layers: tuple[str, ...],
        limits: Limits,
        writable: str | None,
    ) -> None:
        self._channel = channel
        self.memory = memory
        self.pid = pid
        self.layers = layers
        self.limits = limits
        self.writable = writable
        self._session = _session(pid)
        self._space: str | None = None
        with contextlib.suppress(OSError):
            space = os.readlink(f"/proc/{pid}/ns/pid")
            if space != os.readlink("/proc/self/ns/pid"):
                self._space = space

    @property
    def strong(self) -> bool:
        """Whether code that nobody has read may run in it: no network, no files of others."""
        return {LANDLOCK, SECCOMP} <= set(self.layers) or (
            NAMESPACES in self.layers and LANDLOCK in self.layers
        )

    def ask(self, request: Message, seconds: float) -> Message:
        """The answer to a request.  Raises ProgramError when there is none, or it is an error."""
        try:
            send(self._channel, request)
        except OSError:
            raise ProgramError("its process ended") from None
        return self.answer(seconds)

    def answer(self, seconds: float) -> Message:
        """Waits for an answer."""
        try:
            answer = receive(self._channel, seconds, self._watch)
        except ChannelError as error:
            raise ProgramError(str(error)) from None
        if "error" in answer:
            text = str(answer["error"])[:_LONGEST_REASON]
            raise ProgramError("".join(c if c.isprintable() else " " for c in text))
        return answer

    def post(self, request: Message) -> None:
        """Sends a request without waiting for the answer."""
        try:
            send(self._channel, request)
        except OSError:
            raise ProgramError("its process ended") from None

    def stop(self) -> None:
        """Halts every thread of it; returns when none of them runs."""
        for pid in self._pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + 1.0
        while any(_state(pid) in "RS" for pid in self._pids()):
            if time.monotonic() > end:
                raise ProgramError("its process does not stop")

    def go_on(self) -> None:
        """Lets a halted process run."""
        for pid in self._pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def pin(self, processors: Collection[int]) -> None:
        """Lets it run on these processors only, so that programs which take turns run in one place."""
        for pid in self._pids():
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.sched_setaffinity(int(thread), processors)

    def close(self) -> None:
        """Ends it and everything that it started."""
        for pid in self._pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._channel.close()
        if self.writable is not None:
            shutil.rmtree(self.writable, ignore_errors=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _pids(self) -> list[int]:
        """It, and with it whatever lives in its namespace, or in its session where it has none of its own."""
        if not self.limits.programs:
            return [self.pid]
        found = [self.pid]
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) != self.pid and self._owns(int(name)):
                found.append(int(name))
        return found

    def _owns(self, pid: int) -> bool:
        if self._space is not None:
            with contextlib.suppress(OSError):
                return os.readlink(f"/proc/{pid}/ns/pid") == self._space
            return False
        alone = self._session not in (None, _session(os.getpid()))
        # The guard leads the session and ends with the process.
        return alone and pid != self._session and _session(pid) == self._session

    def _watch(self) -> None:
        """Ends a process that holds more than it may."""
        facts = _status(self.pid)
        held = facts.get("RssAnon", 0) * 1024
        if held > self.limits.memory:
            self.close()
            raise ProgramError(f"it held more than {self.limits.memory} bytes of memory")
        if facts.get("Threads", 0) > self.limits.threads:
            self.close()
            raise ProgramError(f"it started more than {self.limits.threads} threads")
        if self.writable is not None and _bytes_in(self.writable) > self.limits.memory:
            self.close()
            raise ProgramError(f"it wrote more than {self.limits.memory} bytes of files")


def _session(pid: int) -> int | None:
    """The session of a process; None when it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as facts:
            return facts.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"


def _status(pid: int) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "Threads"):
                found[name] = int(value.split()[0])
    return found


def _bytes_in(folder: str) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def _readable() -> list[str]:
    """Folders that hold Python, its libraries and those of the system: nothing of the user's own."""
    named = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
    named += [str(Path(foveal.__file__).parent), str(Path(sys.executable).resolve().parent.parent)]
    named += ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/opt"]
    named += ["/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/usr/local/cuda"]
    return [path for path in dict.fromkeys(named) if path != "/" and os.path.exists(path)]


def _environment(writable: str | None) -> dict[str, str]:
    """Nothing of the user's: no keys, no home."""
    found: dict[str, Any] = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/local/cuda/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HOME": writable or "/nonexistent",
        "TMPDIR": writable or "/nonexistent",
        "TRITON_CACHE_DIR": str(Path(writable or "/nonexistent") / "triton"),
    }
    return found | {n: os.environ[n] for n in _DEVICE_VARIABLES if n in os.environ}
