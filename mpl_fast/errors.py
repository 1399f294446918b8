"""The errors that a user can correct: one line each, with an exit code for each kind."""

import codecs
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

INTERRUPTED = 130  # a shell's exit code after Ctrl-C
HUNG = 7  # a rank made no progress: the watchdog ended it
PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal after saving; run the same command again
RANK_DELAY = 5.0  # seconds
STDERR = 2  # file descriptor
ANY_TEXT = "mpl_fast.any_text"
# Of a disk, in any file: never the error of a program.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
# What a terminal obeys, what ends a line, and what reverses the direction of text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# On a stream, lines and tabs are the program's own, as is what it replaces a line with.
_STREAM_CONTROL = re.compile(r"(?![\t\n])" + _CONTROL.pattern)
_LINE_START = re.compile(r"(\r|\x1b\[K)*")


class UserError(Exception):
    """Something that the user can correct; its text is one line: what is wrong, and what to do."""

    exit_code = 1
    alone = False
    """Raised on this rank only, which then prints it; else the first rank of each machine does."""


class ConfigError(UserError):
    """A wrong option, YAML key or value, or a combination of them that cannot work."""

    exit_code = 2


class OutputError(UserError):
    """The output cannot be written: no space, no permission, in use, or taken."""

    exit_code = 3


class DataError(UserError):
    """Records, an index, an image or a folder that is missing, damaged or does not fit."""

    exit_code = 4


class NonFiniteError(UserError):
    """Loss, gradients or weights are no longer finite, so that training cannot continue."""

    exit_code = 5


class CheckpointError(UserError):
    """No checkpoint can be read, or it belongs to another run."""

    exit_code = 6


class LostRankError(UserError):
    """Another rank has ended or cannot be reached."""

    exit_code = 8
    alone = True


def run_command(program: str, command: Callable[[], int | None], interrupted: str = "") -> NoReturn:
    """Runs a command and exits with its code, that of its `UserError`, or `INTERRUPTED`.

    If its stdout or stderr is closed early, as by ``| head -1``, the command continues without it;
    a stdout that cannot be written is an `OutputError`. The name of a file that is not UTF-8 is
    printed as it is; another character that the encoding of stdout lacks, as its number: ``\\xb1``;
    so are control characters, which only a name from data can have here: see `printable`.
    """
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)
    try:
        try:
            code = command()
        finally:
            if sys.stdout:
                sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        fail(program, error)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        failure = OutputError(f"{error.filename or 'a file'}: {error.strerror}")
        failure.alone = True
        fail(program, failure)
    except KeyboardInterrupt:
        if interrupted:
            print(f"{program}: {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _guarded(stream: TextIO) -> TextIO:
    """The same stream through `_Output`, if it is a stream of the process."""
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    return _Printed(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors if stream.errors == "backslashreplace" else ANY_TEXT,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _any_text(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of codecs that writes one character in any case."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    one = UnicodeEncodeError(
        error.encoding, error.object, error.start, error.start + 1, error.reason
    )
    try:
        return codecs.lookup_error("surrogateescape")(one)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(one)


codecs.register_error(ANY_TEXT, _any_text)


class _Printed(io.TextIOWrapper):
    """A stream on which a name cannot move the cursor, color the text or retitle the window."""

    def write(self, text: str, /) -> int:
        own = _LINE_START.match(text)
        begun = own.end() if own else 0
        return super().write(text[:begun] + _STREAM_CONTROL.sub(_escape, text[begun:]))


class _Output(io.FileIO):
    """Standard output or error until it cannot be written; from then on, /dev/null."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if isinstance(error, BrokenPipeError) or self.fileno() == STDERR:
                return super().write(data)
            raise OutputError(f"standard output: {error.strerror}") from error


def printable(text: str) -> str:
    r"""Text as one line, with ``\x1b`` and the like in place of control characters.

    For all that is printed with a name from data in it: a file name may have any of them.
    """
    return _CONTROL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def fail(program: str, error: UserError) -> NoReturn:
    """Prints ``PROGRAM: error: ...`` to stderr, on one rank of each machine, and exits.

    Not on one of all ranks: records or a GPU may be missing on another machine than the first.
    """
    if error.alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{program}: error: {printable(str(error))}", file=sys.stderr, flush=True)
    else:
        # torchrun ends all ranks as soon as one has failed: let the one that prints be the first.
        time.sleep(RANK_DELAY)
    sys.exit(error.exit_code)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into an `OutputError` that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror or error}") from error
