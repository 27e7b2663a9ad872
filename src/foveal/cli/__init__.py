"""The command line: one file per sub-command, each with `add_parser` and `run`."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from foveal import __version__
from foveal._errors import FovealError
from foveal.cli import bench, doctor, eval, explain, list, search, show, tune, verify
from foveal.cli._text import columns

COMMANDS = (list, show, explain, bench, eval, tune, search, verify, doctor)
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns its exit status: 0, 1 (a gate is red) or 2 (bad usage)."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser().print_help(sys.stderr)
        return 2
    whole, commands = _built()
    args, unknown = whole.parse_known_args(words)
    if unknown:
        commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except FovealError as error:
        print(_fitted(f"foveal {args.command}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`foveal list | head`); what is left of stdout goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(
            _fitted(f"foveal {args.command}: {error.filename}: {error.strerror}"), file=sys.stderr
        )
        return 2
    return status


def _fitted(sentence: str) -> str:
    """Wrapped where a person reads it; as it is where a program does."""
    if not sys.stderr.isatty():
        return sentence
    room = columns()
    return "\n".join(
        textwrap.fill(line, room, break_long_words=False, break_on_hyphens=False)
        for line in sentence.splitlines()
    )


def parser() -> argparse.ArgumentParser:
    """The whole command line, with every sub-command."""
    return _built()[0]


def _built() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command line, and its sub-commands by their names."""
    whole = argparse.ArgumentParser(
        prog="foveal",
        description="Efficient attention behind one interface: what there is, what a call will do, "
        "how fast it is.",
        epilog="Exit status: 0 success, 1 a gate is red, 2 bad usage. `foveal COMMAND --help` "
        "describes a command.",
    )
    whole.add_argument("--version", action="version", version=f"foveal {__version__}")
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return whole, dict(subparsers.choices)
