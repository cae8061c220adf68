"""How a command ends when something fails that no stage expected: in one line, with the traceback in a file."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

from asrkit.disk import NO_SPACE
from asrkit.errors import UserError, clip

DEBUG = "ASRKIT_DEBUG"
REMEDIES = {
    **dict.fromkeys(NO_SPACE, "free some space or choose another place"),
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EISDIR: "give a file",
    errno.ENOENT: "check the path",
    errno.ELOOP: "its links go in a circle; choose another path",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ENOMEM: "give it more memory, or lower data.max_duration",
}
# What torch, numpy and their allocators say.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Unable to allocate")


def lines_for(error: Exception) -> list[str]:
    """What to print of an exception that reached the command line; an unexpected one writes its traceback to a file."""
    if isinstance(error, UserError):
        return list(error.lines)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{clip(error.filename)}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno, "fix that and run the command again")
        return [f"{where}{error.strerror or os.strerror(error.errno)}; {remedy}"]
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return [f"out of memory ({clip(error) or 'no details'}); give it more memory, or lower data.max_duration"]
    if type(error).__module__ == "soundfile":
        return [f"a sound file cannot be read or written ({clip(error)}); free some space if the disk is full"]
    return [f"unexpected {type(error).__name__}: {clip(error)}; {_logged(error)}"]


def show(error: Exception) -> None:
    """Print what ``lines_for`` says, after the traceback where ASRKIT_DEBUG is set."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    for line in lines_for(error):
        print(f"error: {line}", file=sys.stderr)


def _logged(error: Exception) -> str:
    """Write the traceback to a file; says where it is."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="asrkit-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n{text}")
    except OSError:
        return f"set {DEBUG}=1 to see where"
    return f"{file.name} says where: send it with your report"


def flush_output() -> None:
    """Write out what was printed, while somebody can still be told that it failed.

    Raises:
        OSError: it cannot be written, such as to a full disk; a reader that has gone is no failure.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter tries again as it ends
        if error.errno != errno.EPIPE:
            raise OSError(error.errno, os.strerror(error.errno or 0), "standard output") from error
