"""The memory of the benchmark: JSON lines that are only ever appended to.

One line per case and competitor.  A run that was killed is continued by reading its file; a
last line that was cut off is stepped over, and the next append starts on a line of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import foveal as fv
from foveal.bench.measure import Samples
from foveal.probe.ceilings import ceilings

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1

MEASURED = "measured"
REFUSED = "refused"
ABSENT = "absent"
WRONG = "wrong"
FAILED = "failed"
OUT_OF_MEMORY = "out of memory"
STATUSES = (MEASURED, REFUSED, ABSENT, WRONG, FAILED, OUT_OF_MEMORY)


@dataclass(frozen=True)
class Record:
    """What is known of one competitor on one case.

    `case` is the description of the problem, `key` its identity across runs.  `status`:
    measured; refused (cannot compute this problem), absent (not installed), wrong (the gate
    was red, so it was not timed), failed (it raised), out of memory; `reason` is the sentence that
    goes with all but the first.  `pass_reasons` says why single passes are missing.  `samples` in
    seconds, `peak_bytes` by pass, `held_bytes` kept between calls.  `plan` is what `explain`
    answered.  `work` counts what the case needs: visible `pairs`, and `flops` and `bytes` by pass.
    """

    run: str
    case: Mapping[str, Any]
    key: str
    competitor: str
    title: str
    status: str
    reason: str = ""
    same_result: bool = True
    pass_reasons: Mapping[str, str] = field(default_factory=dict)
    gate: Sequence[Mapping[str, Any]] = field(default_factory=list)
    samples: Samples = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    held_bytes: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)
    work: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    time: str = ""
    schema: int = SCHEMA

    @property
    def name(self) -> str:
        return str(self.case["name"])


class RecordFile:
    """A file of records that survives kills and concurrent writers."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, records: Iterable[Record]) -> None:
        """Adds lines in one write to the end of the file, on disk when this returns."""
        lines = "".join(
            json.dumps(asdict(record), separators=(",", ":"), allow_nan=False) + "\n"
            for record in records
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if fcntl is not None:  # a write that is under way may look like the middle of a line
                fcntl.flock(handle, fcntl.LOCK_EX)
            os.write(handle, (self._seam() + lines).encode("utf-8"))
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> list[Record]:
        """The latest record of every case and competitor, in the order they first appeared."""
        if not self.path.exists():
            return []
        latest: dict[tuple[str, str], Record] = {}
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _parsed(line)
            if record is not None:
                latest[record.key, record.competitor] = record
        return list(latest.values())

    def _seam(self) -> str:
        """A line break when the file ends in the middle of a line."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return ""
        with self.path.open("rb") as content:
            content.seek(-1, os.SEEK_END)
            return "" if content.read(1) == b"\n" else "\n"


def environment(device: torch.device, dtypes: Iterable[torch.dtype] = ()) -> dict[str, Any]:
    """Device, threads and versions that a measurement depends on.

    `ceilings` by dtype: FLOP/s of a large matrix product and bytes/s of a large copy, measured here.
    """
    facts: dict[str, Any] = {
        "device": device.type,
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "foveal": fv.__version__,
        "commit": _commit(),
        "ceilings": {
            str(dtype).removeprefix("torch."): asdict(ceilings(str(device), dtype))
            for dtype in dict.fromkeys(dtypes)
        },
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver_clock_mhz"] = _clock(device)
    return facts


def load() -> float | None:
    """Processes that wanted to run during the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def command_line() -> str:
    """The command that started this process, as a user would type it."""
    name = Path(sys.argv[0]).name
    return " ".join(["foveal" if name in ("__main__.py", "foveal") else name, *sys.argv[1:]])


def _parsed(line: str) -> Record | None:
    """A record, or None for a torn line or one of a schema that this version cannot read."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        return None
    known = {each.name for each in fields(Record)}
    return Record(**{name: value for name, value in values.items() if name in known})


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _clock(device: torch.device) -> int | None:
    try:
        return torch.cuda.clock_rate(device)
    except (RuntimeError, ImportError, AttributeError):
        return None


def _commit() -> str:
    """The revision of the source tree that foveal runs from, with + when it has changes."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
