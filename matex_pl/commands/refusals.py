"""Refusals and bugs: the last line of defense of every command."""

from __future__ import annotations

import errno
import sys
import traceback
from dis import opmap
from typing import NoReturn

# Exceptions that this package raises with a finished message. Bugs of this package are mostly of these types too, but
# come from a library or from an expression, and not from a `raise` statement of this package.
_REFUSED = (FloatingPointError, ImportError, NotImplementedError, OSError, TypeError, ValueError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAYS_OUT = {
    errno.EACCES: "Change its permissions, or give another path.",
    errno.EPERM: "Change its permissions, or give another path.",
    errno.EROFS: "Give a path on another disk.",
    **dict.fromkeys(_NO_ROOM, "Make room on the disk, or give another path."),
}
_BUG = (
    "This is a bug, unless the lines above name your own code. Report the command and these lines in the issue tracker "
    "of matex_pl."
)


def end_with(command: str, error: Exception, *, debug: bool) -> NoReturn:
    """Exit after an exception: with its message and status 2 for a refusal, with the traceback and status 1 for a bug.

    Args:
        command: Name of the command, in front of the message.
        error: The exception.
        debug: Whether to print the traceback of a refusal too.
    """
    message = refusal(error)
    if debug or message is None:
        traceback.print_exception(error)
    if message is None:
        print(_BUG, file=sys.stderr)
        raise SystemExit(1) from error
    stop(f"{command}: {message}")


def stop(message: str) -> NoReturn:
    """Exit with a message and status 2, as argparse does for wrong options; `sys.exit(message)` gives status 1."""
    print(message, file=sys.stderr)
    end = SystemExit(message)
    end.code = 2
    raise end


def refusal(error: BaseException) -> str | None:
    """Message of an exception for the user; None for a bug.

    A refusal is an exception that a `raise` statement of this package raised, also as the cause of a library's
    exception. Errors of files, of memory and of the Trainer's settings are refusals too.
    """
    cause: BaseException | None = error
    while cause is not None:
        message = _own_message(cause) or _system_message(cause) or _trainer_message(cause)
        if message:
            return message
        cause = cause.__cause__
    return None


def _own_message(error: BaseException) -> str | None:
    is_refused = isinstance(error, _REFUSED) and _raised_in(error).startswith("matex_pl.")
    return str(error) if is_refused else None


def _system_message(error: BaseException) -> str | None:
    """Message of an error of the operating system, or of a lack of memory."""
    if isinstance(error, OSError) and error.errno and (error.filename is not None or error.errno in _NO_ROOM):
        place = "" if error.filename is None else f": {str(error.filename)!r}"
        return f"{error.strerror}{place}. {_WAYS_OUT.get(error.errno, 'Check the path.')}"
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "The memory is full. Lower the batch size, or use a smaller model or image size."
    if text.startswith("DataLoader worker (pid"):
        return (
            "The system ended a process that reads images, mostly for lack of memory. Lower data.num_workers or "
            "data.batch_size."
        )
    return None


def _trainer_message(error: BaseException) -> str | None:
    """Message of Lightning on the settings of the Trainer and of its callbacks."""
    module = _raised_in(error)
    is_callback = isinstance(error, RuntimeError) and module.startswith("lightning.pytorch.callbacks.")
    if not is_callback and type(error).__name__ != "MisconfigurationException":
        return None
    return f"The Trainer cannot run with these settings. {' '.join(str(error).split())}"


def _raised_in(error: BaseException) -> str:
    """Module of the `raise` statement of an exception; empty if an expression or a library in C raised it."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    is_raised = frame.f_code.co_code[trace.tb_lasti] == opmap["RAISE_VARARGS"]
    return str(frame.f_globals.get("__name__", "")) if is_raised else ""
