"""The errors a user can cause: each is one clear line, and each kind has its own exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. Its text is one line: what is wrong, where, what to do."""

    exit_code = 1
    alone = False
    """Met by this rank and no other, which then has to tell it; else rank 0 does."""


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
    """The loss left the finite numbers: going on would only spoil the last good checkpoint."""

    exit_code = 5


class CheckpointError(UserError):
    """No checkpoint can be read, or it belongs to another run than the one asked for."""

    exit_code = 6


PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal after saving; run the same command again


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into one line about the output at path."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror or error}") from error
