"""The command line: one dataclass a command, each a few lines onto the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import tyro

import segmamba
from segmamba.cli.machine import Benchmark, Demo, Info
from segmamba.cli.results import Compare, Evaluate, Predict
from segmamba.cli.training import Check, Plan, Postprocess, Train
from segmamba.console import (
    accept_every_letter,
    explain,
    quiet_when_unread,
    say,
    say_error,
    showing_warnings,
)

COMMANDS = {
    "check": Check,
    "plan": Plan,
    "train": Train,
    "postprocess": Postprocess,
    "predict": Predict,
    "evaluate": Evaluate,
    "compare": Compare,
    "info": Info,
    "demo": Demo,
    "benchmark": Benchmark,
}


class Command(Protocol):
    """What each command's dataclass has."""

    def run(self) -> int:
        """Do it, and give the exit code."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; default: the process's.

    Returns:
        The exit code: 0 if all went well, 1 for an error or where nobody reads the
        output any more (`| head`), 130 when interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    accept_every_letter()
    if words == ["--version"]:
        say(f"segmamba {segmamba.__version__}")
        return 0
    with quiet_when_unread():
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="segmamba",
            description=(segmamba.__doc__ or "").partition("\n")[0],
            args=words,
        )
        return _run(command, words)


def _run(command: Command, words: list[str]) -> int:
    from segmamba.manifest import typed  # slow

    try:
        with showing_warnings(), typed(words):
            return command.run()
    except KeyboardInterrupt:
        say_error("interrupted; what was finished is kept.")
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        say_error(explain(error))
        # A training that a signal ends saves, and says how to go on.
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else 1
