"""What every benchmark shares: common options, a report that is saved as it grows, exit codes.

A benchmark is a file with a docstring, of which the first line is the `--help`, and `main`::

    def main(arguments: Sequence[str]) -> int:
        return run("optimizer", __doc__, arguments, measure, options, rounds=20, tiny=TINY)

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", ...)     # beside the common options, see `run`

    def measure(options: argparse.Namespace, report: Report) -> None:
        variants = {...}                        # name -> callable
        ...                                     # compare them first: with report.attempt(name)
        seconds = report.interleaved(variants, seconds_of, warmup=2)
        report.add([Row(name, spread(values), "ms") for name, values in seconds.items()])

`tools/bench/optimizer.py` is a complete example.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile

from mpl_fast import atomic
from mpl_fast.errors import UserError, output_errors
from tools.bench.clock import T, V, interleaved, wait_for_gpu
from tools.bench.limits import Limits
from tools.bench.machine import choose_device, describe
from tools.bench.results import FORM, Json, Row, one_line, row_json, table

Options = argparse.Namespace


class DeviceLostError(RuntimeError):
    """The GPU no longer computes correctly: nothing after this can be measured."""


def require_device() -> None:
    """Raises `DeviceLostError` if there is a GPU and it computes no more."""
    try:
        wait_for_gpu()
    except RuntimeError as error:
        raise DeviceLostError(f"the device is unusable: {one_line(error)}") from error


class Report:
    """The result of one run; every `add` writes it, so that a kill loses only what came after."""

    def __init__(self, bench: str, options: Options) -> None:
        self.claim = ""
        """One sentence: what the numbers are."""
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        """What was left out, for lack of time or of a package."""
        self.failed: dict[str, str] = {}
        """Variants that raised or computed something else, with the reason: exit code 1."""
        self.more: Json = {}
        """Further parts of the JSON file."""
        self._bench, self._options = bench, options
        minutes = float("inf") if options.minutes is None else options.minutes
        self._deadline = time.monotonic() + 60.0 * minutes

    def add(self, rows: Iterable[Row]) -> None:
        """Takes rows and writes the file."""
        self.rows += rows
        self.save()

    def fail(self, name: str, why: str) -> None:
        """Notes a variant that is wrong or that raised; it is not timed."""
        self.failed[name] = why
        print(f"FAILED: {name}: {why}", file=sys.stderr, flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An exception inside is why `name` failed; if the GPU is lost as well, the run ends."""
        try:
            yield
        except UserError:  # the disk is full
            raise
        except Exception as error:
            self.fail(name, one_line(error))
            require_device()

    def seconds_left(self, parts: int = 1) -> float:
        """An equal share of the time until `--minutes` are over; infinite without that option."""
        return (self._deadline - time.monotonic()) / parts

    def interleaved(
        self, variants: Mapping[str, V], timer: Callable[[V], T], *, warmup: int, parts: int = 1
    ) -> dict[str, list[T]]:
        """See `clock.interleaved`: `--rounds` rounds, as many as its part of `--minutes` allows."""
        return interleaved(
            variants,
            timer,
            rounds=self._options.rounds,
            warmup=warmup,
            seed=self._options.seed,
            seconds=self.seconds_left(parts),
        )

    @cached_property
    def limits(self) -> Limits:
        """What this machine can do at best, measured once, on the device of `--device`."""
        options = vars(self._options)
        folder = options.get("work") or options.get("folder") or self._options.out.parent
        device = choose_device(options.get("device", "auto"))
        with output_errors(folder):
            return Limits(folder, device, small=self._options.smoke)

    @cached_property
    def _machine(self) -> Json:
        """Once: git and nvidia-smi take longer than many a measurement."""
        return describe(self._options.commit)

    def result(self) -> Json:
        """What is written."""
        smoke = "a smoke test: no number here is a claim"
        return {
            "form": FORM,
            "bench": self._bench,
            "claim": smoke if self._options.smoke else self.claim,
            "machine": self._machine,
            "settings": {key: str(value) for key, value in vars(self._options).items()},
            "rows": [row_json(row) for row in self.rows],
            "limits": [row_json(row) for row in self.limits.rows()],
            "failed": self.failed,
            "skipped": self.skipped,
            **self.more,
        }

    def save(self) -> None:
        """Writes the file whole or not at all. May raise `OutputError`."""
        with output_errors(self._options.out):
            atomic.write_json(self._options.out, self.result())


def run(
    bench: str,
    doc: str | None,
    arguments: Sequence[str],
    measure: Callable[[Options, Report], None],
    options: Callable[[argparse.ArgumentParser], None],
    *,
    rounds: int,
    tiny: Mapping[str, object],
) -> int:
    """Parses options, measures, writes the JSON file and prints its table.

    `--smoke` replaces the options named in `tiny`. Exit codes: 0; 1, something failed or is wrong
    (`Report.fail`); 2, an option is wrong or the output cannot be written; 3, the GPU is lost.
    """
    parsed = parse(bench, doc, arguments, options, rounds)
    if parsed.smoke:
        vars(parsed).update(tiny)
    code = 0
    try:
        require_writable(parsed.out)
        report = Report(bench, parsed)
        try:
            measure(parsed, report)
        except DeviceLostError as lost:  # the rows until here are good
            report.fail("the GPU", str(lost))
            code = 3
        except KeyboardInterrupt:  # its time may be over
            report.save()
            raise
        report.save()
    except UserError as error:
        print(f"tools.bench {bench}: error: {error}", file=sys.stderr)
        return 2
    _print(report.result(), parsed.out)
    return code or int(bool(report.failed))


def parse(
    bench: str,
    doc: str | None,
    arguments: Sequence[str],
    options: Callable[[argparse.ArgumentParser], None],
    rounds: int,
) -> Options:
    """The options of a benchmark and those that all have."""
    description = " ".join((doc or "").partition("\n\n")[0].split())
    parser = argparse.ArgumentParser(
        f"python -m tools.bench {bench}", allow_abbrev=False, description=description
    )
    options(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path(f"runs/bench/{bench}.json"), help="(%(default)s)")
    add("--rounds", type=at_least(1), default=rounds, metavar="N", help="(%(default)s)")
    add("--minutes", type=float, metavar="M", help="begin no further round after so long")
    add("--seed", type=int, default=0, metavar="N", help="of the order of turns (%(default)s)")
    add("--commit", metavar="NAME", help="the code's commit, where there is no git")
    add("--smoke", action="store_true", help="everything once, tiny: no number is a claim")
    return parser.parse_args(arguments)


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is too small: give at least {least}")
        return int(text)

    number.__name__ = "whole number"
    return number


def require_writable(out: Path) -> None:
    """Raises `OutputError` before a long measurement if its result could not be written."""
    with output_errors(out):
        if out.is_dir():
            raise IsADirectoryError(None, "is a folder: name a file", str(out))
        out.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=out.parent):
            pass


def _print(found: Json, out: Path) -> None:
    print(found["claim"])
    print(table(found["rows"]))
    print("\nLimits of this machine:\n\n" + table(found["limits"]))
    for line in found["skipped"]:
        print(f"left out: {line}")
    for name, why in found["failed"].items():
        print(f"FAILED: {name}: {why}")
    print(f"written: {out}")
