"""Refusals and bugs: the last line of defense of every command."""

from __future__ import annotations

import errno
import re
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
# Lightning's reasons that depend on the data: pattern, and the message with the groups of the pattern.
_TRAINER_REASONS = (
    (
        r"`val_check_interval` \((\S+)\) must be less than or equal to the number of the training batches \((\d+)\)",
        "--trainer.val_check_interval is {0}, but an epoch has {1} batches. Give a number up to {1}, or a share of an "
        "epoch such as 0.5.",
    ),
    (
        r"enable_checkpointing=False` but found `ModelCheckpoint`",
        "--trainer.enable_checkpointing is false, but the callbacks have a ModelCheckpoint. Leave out one of the two.",
    ),
    (
        r"Trainer\(barebones=True, (\w+)=",
        "--trainer.barebones is true, which does not go with --trainer.{0}. Leave out one of the two.",
    ),
    (
        r"Timer\(duration='(.*?)'\)",
        "--trainer.max_time must have the form DD:HH:MM:SS, got '{0}'.",
    ),
)
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
    """Message for an error of Lightning about the settings of the Trainer, its loggers and its callbacks."""
    module, text = _raised_in(error), str(error).strip()
    package = re.search(r"Requirement '([\w.-]+)[^']*' not met|pip install (?:-U )?[`']?([\w.-]+)", text)
    if package and module.startswith(("lightning.", "jsonargparse.")):
        name = package[1] or package[2]
        part = re.search(r"class_path '(?:[\w.]+\.)?(\w+)'", text)
        return f"{part[1] if part else 'The setting'} needs the package {name}. Install it with: pip install {name}"
    is_callback = isinstance(error, RuntimeError) and module.startswith("lightning.pytorch.callbacks.")
    is_setting = isinstance(error, (ImportError, ValueError)) and module.startswith("lightning.")
    if not (is_callback or is_setting) and type(error).__name__ != "MisconfigurationException":
        return None
    for pattern, message in _TRAINER_REASONS:
        if found := re.search(pattern, text):
            return message.format(*found.groups())
    reason = re.sub(r"<([\w.]+) object at 0x\w+>", r"\1", text.splitlines()[0][:400] if text else "No reason is given.")
    return f"The Trainer cannot run with these settings. {reason}"


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
