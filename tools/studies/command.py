"""Command line, output folder and files of a study; torch-free, so that --help is instant."""

import argparse
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import mpl_fast
from mpl_fast.atomic import atomic_path
from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors, run_command

Content = str | Callable[[Path], None]  # of a file: a text, or a function that writes to a path


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number with a lower bound."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            message = f"must be a whole number of at least {least}, not {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value

    return read


def main(program: str, study: Callable[[], None]) -> NoReturn:
    """Runs a study; an error or Ctrl-C ends the process with one line and an exit code."""

    def checked() -> None:
        try:
            study()
        except ModuleNotFoundError as error:
            missing = f"{error.name} is missing: pip install scikit-learn matplotlib"
            raise UserError(missing) from error

    run_command(program, checked, "interrupted; nothing was written")


def prepare(out: Path) -> None:
    """Creates the output folder. Raises `OutputError` before the work if it is not writable."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".study.probe"
        probe.touch()
        probe.unlink()


def write(out: Path, contents: Mapping[str, Content]) -> list[Path]:
    """Writes all files or, after an error or Ctrl-C, none."""
    with output_errors(out), ExitStack() as stack:
        for name, content in contents.items():
            temporary = stack.enter_context(atomic_path(out / name))
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            else:
                content(temporary)
    return [out / name for name in contents]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package, Python and the named distributions."""
    own = {"mpl_fast": mpl_fast.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}
