"""What a process gives up, once and for good, before it runs code that nobody trusts.

Runs in the process that is to be confined, right after it was forked, and uses the standard library
only.  Each layer is used where the kernel offers it; `confine` says which ones were.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable
from dataclasses import dataclass

NAMESPACES, LANDLOCK, SECCOMP, LIMITS = "namespaces", "landlock", "seccomp", "rlimits"
LAYERS = (NAMESPACES, LANDLOCK, SECCOMP, LIMITS)

_NEW_USER, _NEW_NET, _NEW_PID = 0x10000000, 0x40000000, 0x20000000
_NEW_IPC, _NEW_UTS = 0x08000000, 0x04000000
_SET_PARENT_DEATH, _SET_DUMPABLE, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

_READ = 0b1101
"""Landlock: execute, read a file, read a folder."""
_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_DEVICE = 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15

_EPERM, _ENOSYS = 1, 38
_THREAD = 0x10000
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


@dataclass(frozen=True)
class Limits:
    """What a confined process may use.

    memory: bytes that it may hold; cpu: seconds of processor time; files: open files; file_size: bytes of one
    file; threads: at most so many; programs: whether it may start other programs (compilers need that);
    device: whether it may use a GPU, which rules out a limit of address space.
    """

    memory: int = 2 << 30
    cpu: int = 120
    files: int = 64
    file_size: int = 16 << 20
    threads: int = 64
    programs: bool = False
    device: bool = False


def enter_namespaces(device: bool = False) -> bool:
    """Own network (none), processes, IPC and names; processes only after the next fork.

    With a device processes stay those of the system: CUDA looks itself up in /proc by its number.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    flags = _NEW_USER | _NEW_NET | _NEW_IPC | _NEW_UTS | (0 if device else _NEW_PID)
    if libc.unshare(flags) != 0:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/self/{name}", "w", encoding="ascii") as map_,
        ):
            map_.write(text)
    return True


def die_with_parent() -> None:
    """The process is killed when the one that forked it ends."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH, 9, 0, 0, 0)


def confine(limits: Limits, readable: Iterable[str], writable: str | None) -> list[str]:
    """Gives up everything but reading some folders and writing one; returns the layers in force."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    layers = [LIMITS]
    _limit(limits)
    _drop_capabilities(libc)
    if _landlock(libc, readable, writable, limits.device):
        layers.append(LANDLOCK)
    if _seccomp(libc, limits):
        layers.append(SECCOMP)
    return layers


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = struct.pack("Ii", 0x20080522, 0)
    libc.capset(ctypes.create_string_buffer(header), ctypes.create_string_buffer(bytes(24)))


def _limit(limits: Limits) -> None:
    values = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits.cpu,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_FSIZE: limits.file_size,
    }
    if not limits.device:
        values[resource.RLIMIT_AS] = limits.memory + _address_space()
    for name, most in values.items():
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))


def _address_space() -> int:
    """Bytes of address space that are mapped already."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[0]) * resource.getpagesize()


def _landlock(
    libc: ctypes.CDLL, readable: Iterable[str], writable: str | None, device: bool
) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        rights |= (version >= since) << bit
    words = [rights]
    if version >= 4:
        words.append(0b11)
    if version >= 6:
        words.append(0b11)
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = libc.syscall(
        _CREATE_RULESET, ctypes.create_string_buffer(attributes), len(attributes), 0
    )
    if ruleset < 0:
        return False
    granted = [(path, _READ) for path in readable]
    granted += [("/dev/null", _DEVICE), ("/dev/zero", _DEVICE), ("/dev/urandom", _DEVICE)]
    if device:
        granted += [(f"/dev/{n}", _DEVICE) for n in os.listdir("/dev") if n.startswith("nvidia")]
        granted += [("/proc", _READ), ("/sys", _READ), ("/dev/shm", rights)]
        # CUDA names its threads by writing there; /proc as a whole would be settings of the system too.
        granted.append(("/proc/self", _READ | _DEVICE))
    if writable is not None:
        granted.append((writable, rights))
    for path, access in granted:
        _allow(libc, ruleset, path, access & rights)
    return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, access: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not os.path.isdir(path):
        access &= _FILE_RIGHTS
    rule = ctypes.create_string_buffer(struct.pack("=Qi", access, handle))
    libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    os.close(handle)


# System calls by name, on x86_64 and on aarch64 (None: there is none).
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "socketpair": (53, 199),
    "connect": (42, 203), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268), "unshare": (272, 97),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "open_by_handle_at": (304, 265), "pidfd_getfd": (438, 438), "pidfd_open": (434, 434),
    "memfd_create": (319, 279), "kill": (62, 129), "tkill": (200, 130), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "shmget": (29, 194), "personality": (135, 92), "setsid": (112, 157),
}  # fmt: skip
_PROGRAMS = ("fork", "vfork", "execve", "execveat", "kill")
_ON_DEVICES = ("memfd_create", "socketpair", "connect", "sched_setaffinity", "shmget")


def _seccomp(libc: ctypes.CDLL, limits: Limits) -> bool:
    """Refuses system calls that a computation has no need of."""
    column = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
    if column is None:
        return False
    architecture = (0xC000003E, 0xC00000B7)[column]
    numbers = {name: pair[column] for name, pair in _CALLS.items() if pair[column] is not None}
    refused = set(numbers) - {"clone", "clone3", "socket"}
    if limits.programs:
        refused -= set(_PROGRAMS)
    if limits.device:
        refused -= set(_ON_DEVICES)
    code = [_load(4), _jump(architecture, 1, 0), _answer(_KILL), _load(0)]
    if column == 0:
        code += [_jump_at_least(0x40000000, 0, 1), _answer(_ERRNO | _EPERM)]
    for name in sorted(refused):
        number = numbers[name]
        assert number is not None
        code += [_jump(number, 0, 1), _answer(_ERRNO | _EPERM)]
    code += [_jump(numbers["socket"] or 0, 0, 3), _load(16)]
    code += [_jump(1 if limits.device else 0xFFFF, 1, 0), _answer(_ERRNO | _EPERM), _load(0)]
    if not limits.programs:
        code += [_jump(numbers["clone3"] or 0, 0, 1), _answer(_ERRNO | _ENOSYS)]
        code += [_jump(numbers["clone"] or 0, 0, 3), _load(16)]
        code += [_jump_bits(_THREAD, 1, 0), _answer(_ERRNO | _EPERM)]
    code.append(_answer(_ALLOW))
    filters = ctypes.create_string_buffer(b"".join(code))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    )
    return bool(libc.prctl(_SET_SECCOMP, 2, program, 0, 0) == 0)


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", 0x20, 0, 0, offset)


def _jump(value: int, equal: int, other: int) -> bytes:
    return struct.pack("HBBI", 0x15, equal, other, value)


def _jump_at_least(value: int, yes: int, no: int) -> bytes:
    return struct.pack("HBBI", 0x35, yes, no, value)


def _jump_bits(bits: int, any_set: int, none: int) -> bytes:
    return struct.pack("HBBI", 0x45, any_set, none, bits)


def _answer(value: int) -> bytes:
    return struct.pack("HBBI", 0x06, 0, 0, value)
