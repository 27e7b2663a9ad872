"""A progress bar on stderr for everything longer than two seconds."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_PATIENCE = 2.0
_LINE_EVERY = 15.0
_WIDTH = 24


class Progress:
    """Shows what is being done and how much of it is done.

        with Progress("bench") as progress:
            progress("image 96x96: timing", 0.4)

    Silent for two seconds; then one line that redraws itself on a terminal, its clock every second, or
    a line every 15 seconds elsewhere.  Wiped at the end, so that results stand alone.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = stream or sys.stderr
        self.start = time.monotonic()
        self._drawn = 0
        self._last = 0.0
        self._shown: tuple[str, float] | None = None
        self._guard = threading.RLock()
        self._ended = threading.Event()

    def __call__(self, text: str, share: float) -> None:
        """Announces work; `share` is the part of the whole that is done, 0 to 1."""
        with self._guard:
            self._shown = text, min(max(share, 0.0), 1.0)
            self._show(*self._shown)

    def _show(self, text: str, share: float) -> None:
        now = time.monotonic()
        if now - self.start < _PATIENCE:
            return
        elapsed = now - self.start
        left = f", {_clock(elapsed / share - elapsed)} left" if 0.03 < share < 1 else ""
        facts = f"{share:4.0%}  {_clock(elapsed)}{left}  {text}"
        if self.stream.isatty():
            done = round(share * _WIDTH)
            self._draw(f"{self.title} [{'#' * done}{'.' * (_WIDTH - done)}] {facts}")
        elif now - self._last >= _LINE_EVERY:
            self._last = now
            print(f"{self.title} {facts}", file=self.stream, flush=True)

    def clear(self) -> None:
        """Wipes the bar, so that something else can be printed."""
        with self._guard:
            self._shown = None
            if self._drawn:
                self._draw("")
                self.stream.write("\r")
                self.stream.flush()
                self._drawn = 0

    def _tick(self) -> None:
        """What was announced last, again with the time as it is."""
        while not self._ended.wait(1.0):
            with self._guard:
                if self._shown is not None:
                    self._show(*self._shown)

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self.clear()

    def _draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        self.stream.write("\r" + text.ljust(self._drawn))
        self.stream.flush()
        self._drawn = len(text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
