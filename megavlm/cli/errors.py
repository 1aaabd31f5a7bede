"""Which exceptions are the user's to mend, and how they look on the terminal.

A ValueError with a `raise` in our own code says what to do: it is printed as it is and the exit code is 2. So is a file that is missing
or not allowed. Anything else, a ValueError from the depths of torch or from int("x") included, is a fault of the program: a traceback and
exit code 1.
"""

from __future__ import annotations

import dis
import errno
import os
import sys
import traceback
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_FAULT = 1
DEBUG_VARIABLE = "MEGAVLM_DEBUG"
OWN_PACKAGES = ("megavlm", "megavlm_launchers", "megavlm_kernels")
_FILE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_DISK_ERRORS = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO}
"""A disk that is full, read-only or broken is for the user to mend too."""


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells the user what to do."""
    if isinstance(error, _FILE_ERRORS) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS):
        return True
    ours = type(error).__module__.partition(".")[0] in OWN_PACKAGES or _has_raise_in_own_code(error)
    return isinstance(error, ValueError) and ours


def _has_raise_in_own_code(error: BaseException) -> bool:
    """Whether the exception began at a `raise` statement of ours, rather than in a built-in function that our code called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] not in OWN_PACKAGES:
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def report(error: Exception) -> int:
    """Prints an exception that reached the top on stderr and returns the exit code. MEGAVLM_DEBUG=1 (--debug) adds the traceback.

    An exception with an `exit_code` of its own says all there is to say.
    """
    own_code = getattr(error, "exit_code", None)
    if not is_user_error(error) and own_code is None:
        traceback.print_exception(error)
        return EXIT_FAULT
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    print(f"megavlm: error: {_message(error)}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR if own_code is None else int(own_code)


def note_exit(code: int) -> None:
    """Leave the exit code where the launcher of this rank asked for it, if it is a failure and the first."""
    if code:
        from megavlm.config import exits  # here: pydantic comes with it, and `megavlm --help` needs neither

        exits.note_exit(code)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS and error.strerror:
        return f"{error.strerror.lower()}{_where_written(error)}: make room, or write elsewhere, and repeat the command"
    return str(error) or type(error).__name__


def _where_written(error: OSError) -> str:
    """The line of ours that a failed write came from: the system does not say which file it was."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if any(f"/{name}/" in f.filename for name in OWN_PACKAGES)]
    return f" (in {Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
