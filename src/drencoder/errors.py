"""Every error a user can cause, as one tree.

::

    DrencoderError            the command line prints it as one sentence and exits with code 2
    ├── RecipeError           a recipe file, an override or an option that cannot be meant
    ├── DataError             data that is missing, unreadable, empty or ill-shaped
    ├── ModelError            a base model or an adapter that cannot be loaded or trained
    ├── DeviceError           a device that is not there, or is there no longer
    ├── PrivacyError          a privacy statement that cannot be made
    │   └── BudgetError       the next release would exceed the budget
    ├── EngineError           other machines that cannot be reached, or will not answer
    │   ├── QuorumError       too few clients of a cohort answered
    │   │   ├── RefusedError     nobody will answer: every site refuses for a reason that lasts
    │   │   └── VoidRoundError   under secure aggregation: the sum of the round stays hidden (a SecureError, too)
    │   └── SecureError       a message of secure aggregation that an honest party must not answer
    ├── EncoderError          an encoder that cannot be built or used
    │   ├── CodeError         a received code that is truncated, oversized, foreign or not finite
    │   └── ViabilityError    an encoder that carries nothing, found before any budget was spent
    └── ArtifactError         a run folder that is missing, incomplete or was changed by hand
        └── LostError         a killed run left nothing that could be resumed

Each message names the value, the bound and the cure. A bug of ours is an `AssertionError`
or whatever Python raises, never one of these. Such an exception may quote a client's text, so only its type and
place are shown (`describe_crash`).
"""

import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

_SHOW_TRACEBACK = "DRENCODER_TRACEBACK"
_PACKAGE = Path(__file__).parent


class DrencoderError(Exception):
    """Base of all errors that are the caller's to mend."""


class RecipeError(DrencoderError):
    """A recipe, an override or an option cannot be meant."""


class DataError(DrencoderError):
    """Data is missing, unreadable, empty or ill-shaped."""


class ModelError(DrencoderError):
    """A base model or an adapter cannot be loaded or trained."""


class DeviceError(DrencoderError):
    """The asked-for device is not there, or is there no longer."""


class PrivacyError(DrencoderError):
    """A privacy statement cannot be made."""


class BudgetError(PrivacyError):
    """The next release would exceed the budget."""


class EngineError(DrencoderError):
    """Other machines cannot be reached, or will not answer."""


class QuorumError(EngineError):
    """Too few clients of a cohort answered; `answered` did, or None where that is a secret."""

    def __init__(self, message: str, answered: int | None = None) -> None:
        super().__init__(message)
        self.answered = answered


class RefusedError(QuorumError):
    """Every site refuses for a reason that lasts: no later round would get an answer either."""


class SecureError(EngineError):
    """A message of secure aggregation that an honest party must not answer."""


class VoidRoundError(QuorumError, SecureError):
    """Too few parties or clients answered: the sum of this round stays hidden."""


class EncoderError(DrencoderError):
    """An encoder cannot be built or used."""


class CodeError(EncoderError):
    """A received code is truncated, oversized, foreign or not finite."""


class ViabilityError(EncoderError):
    """An encoder carries nothing; found before any budget was spent."""


class ArtifactError(DrencoderError):
    """A run folder is missing, incomplete or was changed by hand."""


class LostError(ArtifactError):
    """A killed run left nothing that could be resumed."""


def describe_crash(error: BaseException) -> str:
    """Describes an exception that nobody foresaw by its type and place, and never by its message.

    A message may quote a client's record, and so may the messages of the exceptions that caused it. File names and line
    numbers are of source code.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = [_place(frame) for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)][-1:]
    if frames and _place(frames[-1]) not in places:
        places.append(_place(frames[-1]))
    where = f" at {', raised at '.join(places)}" if places else ""
    return (
        f"unforeseen {type(error).__name__}{where}. Its message is not shown, since it may quote private text. Please "
        f"report this line; {_SHOW_TRACEBACK}=1 shows the whole traceback, which may hold text of records."
    )


def report_crash(error: BaseException) -> None:
    """Prints `describe_crash` to stderr; the whole traceback only where the environment has DRENCODER_TRACEBACK=1."""
    print(f"drencoder: {describe_crash(error)}", file=sys.stderr)
    if os.environ.get(_SHOW_TRACEBACK) == "1":
        print(
            f"{_SHOW_TRACEBACK}=1: the lines below may hold text of records. Read them before you pass them on.",
            file=sys.stderr,
        )
        traceback.print_exception(error, file=sys.stderr)


@contextlib.contextmanager
def hide_crash_messages() -> Iterator[None]:
    """Reports whatever the block, or a thread beside it, raises with `report_crash`, and ends the process with code 70.

    DrencoderError is no exception: an entry point handles it inside the block. Of a library's warning only kind and place are
    shown, and a log line that no handler takes, or that cannot be formatted, is dropped. Raises SystemExit.
    """

    def report_uncaught(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            return
        report_crash(error)

    def report_thread(uncaught: threading.ExceptHookArgs) -> None:
        if uncaught.exc_value is not None and not isinstance(uncaught.exc_value, SystemExit):
            report_crash(uncaught.exc_value)

    def report_unraisable(uncaught: "sys.UnraisableHookArgs") -> None:
        if uncaught.exc_value is not None:
            report_crash(uncaught.exc_value)

    def report_warning(
        message: object, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        place = _place(traceback.FrameSummary(filename, lineno, "", lookup_line=False))
        print(f"drencoder: {category.__name__} at {place.removesuffix(' ()')}", file=sys.stderr)
        if os.environ.get(_SHOW_TRACEBACK) == "1":
            print(message, file=sys.stderr)

    hooks = ((sys, "excepthook", report_uncaught), (threading, "excepthook", report_thread),
             (sys, "unraisablehook", report_unraisable), (warnings, "showwarning", report_warning),
             (logging, "raiseExceptions", False), (logging, "lastResort", None))  # fmt: skip
    before = [getattr(module, name) for module, name, _ in hooks]
    try:
        for module, name, hook in hooks:
            setattr(module, name, hook)
        yield
    except Exception as error:
        report_crash(error)
        raise SystemExit(70) from None
    except SystemExit as stop:
        if isinstance(stop.code, int | None):
            raise
        report_crash(stop)  # Python would print what stands in place of the code
        raise SystemExit(70) from None
    finally:
        for (module, name, _), hook in zip(hooks, before, strict=True):
            setattr(module, name, hook)


def _place(frame: traceback.FrameSummary) -> str:
    """Returns file:line (function); the file below the package's or the library's folder, not the whole path."""
    path = Path(frame.filename)
    roots = [_PACKAGE.parent, *(parent for parent in path.parents if parent.name in ("site-packages", "dist-packages"))]
    for root in roots:
        if path.is_relative_to(root):
            path = path.relative_to(root)
            break
    else:
        path = Path(path.name)
    return f"{path}:{frame.lineno} ({frame.name})"
