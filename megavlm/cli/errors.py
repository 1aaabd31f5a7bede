"""Which exceptions are the user's to mend, and how they look on the terminal.

An exception class of ours that derives from ValueError or OSError says what to do: it is printed as it is and the exit code is 2. So is a
file that is missing or not allowed. Anything else is a fault of the program: a traceback and exit code 1.
"""

from __future__ import annotations

import os
import sys
import traceback

EXIT_USER_ERROR = 2
EXIT_FAULT = 1
DEBUG_VARIABLE = "MEGAVLM_DEBUG"
OWN_PACKAGES = ("megavlm", "megavlm_launchers", "megavlm_kernels")
_FILE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells the user what to do."""
    if isinstance(error, _FILE_ERRORS):
        return True
    return isinstance(error, (ValueError, OSError)) and type(error).__module__.partition(".")[0] in OWN_PACKAGES


def report(error: Exception) -> int:
    """Prints an exception that reached the top on stderr and returns the exit code. MEGAVLM_DEBUG=1 (--debug) adds the traceback."""
    if not is_user_error(error):
        traceback.print_exception(error)
        return EXIT_FAULT
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    print(f"megavlm: error: {_message(error)}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror.lower()}"
    return str(error) or type(error).__name__
