"""What a confined process cannot do, asked of the process itself, and what the judge sees of it."""

from __future__ import annotations

import os

import pytest
import torch

from foveal.search.isolate.channel import Region
from foveal.search.isolate.confine import LAYERS, Limits
from foveal.search.isolate.process import Nursery, Process, ProgramError

ECHO = "def f(x):\n    return x * 2\n"


def load(process: Process, text: str) -> None:
    process.ask({"do": "load", "program": {"kind": "source", "text": text, "entry": "f"}}, 10.0)


def outcome(nursery: Nursery, statement: str, limits: Limits = Limits()) -> str:
    """What a program that begins with a statement ends with."""
    with nursery.start(limits) as process:
        try:
            load(process, f"import os, socket, sys, threading, time\n{statement}\n{ECHO}")
        except ProgramError as error:
            return str(error)
    return "done"


def test_this_kernel_offers_every_layer_or_says_which(nursery: Nursery) -> None:
    with nursery.start() as process:
        assert set(process.layers) <= set(LAYERS)
        assert process.strong


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("socket.socket()", "PermissionError"),
        ("socket.socketpair()", "PermissionError"),
        ("open('/etc/passwd')", "PermissionError"),
        ("os.listdir('/')", "PermissionError"),
        ("os.listdir('/proc')", "PermissionError"),
        ("os.listdir(os.path.expanduser('~'))", "Error"),
        ("open('/tmp/foveal', 'w')", "PermissionError"),
        ("open('/dev/shm/foveal', 'w')", "PermissionError"),
        ("os.fork()", "PermissionError"),
        ("os.system('true') == 0 or sys.exit('no shell')", "no shell"),
        ("os.kill(os.getppid(), 0)", "PermissionError"),
        ("os.unshare(0) if hasattr(os, 'unshare') else os.chroot('/')", "PermissionError"),
        ("bytearray(4 << 30)", "MemoryError"),
        ("os.setuid(1000)", "Error"),
        ("assert not [n for n in os.environ if 'KEY' in n or 'TOKEN' in n]", "done"),
        ("assert os.getpid() == 1", "done"),
    ],
)
def test_what_is_refused(nursery: Nursery, statement: str, expected: str) -> None:
    assert expected in outcome(nursery, statement)


def test_too_many_threads_end_a_process(nursery: Nursery) -> None:
    statement = (
        "for _ in range(100): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    )
    found = outcome(nursery, statement + "\ntime.sleep(1)", Limits(threads=20))
    assert "more than 20 threads" in found or "can't start new thread" in found


def test_a_halted_process_does_nothing(nursery: Nursery) -> None:
    counting = (
        "import threading, mmap, gc\nmemory = [o for o in gc.get_objects() if isinstance(o, mmap.mmap)][0]\n"
        "def count():\n    n = 0\n    while True:\n        n = (n + 1) % 251\n        memory[100] = n\n"
        "threading.Thread(target=count, daemon=True).start()\n"
    )
    with nursery.start() as process:
        load(process, counting + ECHO)
        process.stop()
        before = process.memory[100]
        assert all(process.memory[100] == before for _ in range(1000))
        process.go_on()
        assert any(process.memory[100] != before for _ in range(1_000_000))


def test_tensors_travel_as_bytes(nursery: Nursery) -> None:
    with nursery.start() as process:
        load(process, ECHO)
        x = Region(4096, (3, 4), "float64", (5, 1))
        y = Region(8192, (3, 4), "float64")
        x.view(process.memory).copy_(torch.arange(12.0).view(3, 4))
        process.ask({"do": "run", "inputs": [x.as_message()], "outputs": [y.as_message()]}, 10.0)
        assert y.view(process.memory).tolist() == (2 * torch.arange(12.0).view(3, 4)).tolist()


def test_processes_end_with_the_nursery() -> None:
    import os
    import time

    with Nursery() as own:
        process = own.start()
        pid = process.pid
        assert os.path.exists(f"/proc/{pid}")
        process._channel.close()
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_process_without_a_namespace_of_its_own_is_told_from_others_by_its_session(
    nursery: Nursery,
) -> None:
    with nursery.start(Limits(programs=True)) as process:
        process._space = None
        owned = process._pids()
        assert owned == [process.pid]
        process._session = os.getsid(0)
        assert process._pids() == [process.pid]
