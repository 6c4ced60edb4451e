"""How a command ends that could not do what it was asked: one line on standard error, and a code."""

import errno
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from drencoder.reading import one_line, shown

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_streams() -> None:
    """Lets output go nowhere where it was closed, and be escapes where its encoding lacks a letter.

    Otherwise the first file that is opened would stand in for a closed output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))
        elif name != "stdin" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def end_disk(error: OSError) -> NoReturn:
    """Says what the operating system refused; of a file only if the command names it."""
    if error.filename is None and error.errno in _NO_ROOM:
        print("drencoder: the output cannot be written, since the disk is full: make room.", file=sys.stderr)
        stop_writing(2)
    what, why = _file_of(error), os.strerror(error.errno or 0)
    end(f"{what} cannot be read or written ({why}): check the name, the permissions and the disk.")


def _file_of(error: OSError) -> str:
    """The file that an error is about if the command names it, or a folder that it is in: another name may be a client's text."""
    named = {word.partition("=")[2] or word for word in sys.argv[1:]}
    if isinstance(error.filename, str):
        path = Path(error.filename)
        if named & {error.filename, *map(str, [path, *path.parents][:-1])}:
            return shown(error.filename)
    return "a file, or the output,"


def end(sentence: str) -> NoReturn:
    """Prints one sentence and exits with code 2."""
    print(f"drencoder: {one_line(sentence)}", file=sys.stderr)
    raise SystemExit(2) from None


def end_usage(error: Any) -> NoReturn:
    """Says in one sentence what typer found wrong with the options; of `drencoder` alone it has shown the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise SystemExit(2) from None
    command = error.ctx.command_path if getattr(error, "ctx", None) else "drencoder"
    end(f"{error.format_message().rstrip('.')}: see {command} --help.")


def stop_writing(code: int) -> NoReturn:
    """Ends the process with this code. What is still to be printed goes nowhere, so that Python's last flush is silent."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    raise SystemExit(code) from None
