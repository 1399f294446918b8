"""What a person reads of a run's rows and sizes."""

import errno
import io
import os

import pytest

from mpl_fast.errors import OutputError
from mpl_fast.training.console import Console, duration, quantity

ROW = {"images_per_second": 100.0, "data_wait": 0.25, "loss/consistency": 0.5}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (940, "940"),
        (1290, "1.29 k"),
        (77_850, "77.8 k"),
        (999_499, "999 k"),
        (999_900, "1 M"),
        (1_467_610, "1.47 M"),
    ],
)
def test_quantities_have_three_digits_and_a_unit(count: int, text: str) -> None:
    assert quantity(count) == text
    assert quantity(count, "B") == (f"{text}B" if count > 999 else "940 B")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(123, "2:03"), (3723, "1:02:03"), (259_199, "71:59:59"), (400_000, "5 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("rates", "shown"),
    [
        ({"lr/learner": 0.1}, "lr 0.1"),
        ({"lr/teacher": 0.2, "lr/student": 0.0}, "lr teacher 0.2, student 0"),
        ({"lr/first": 0.2, "lr/second": 0.1}, "lr first 0.2, second 0.1"),
    ],
)
def test_a_row_names_its_rates(
    rates: dict[str, float], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Console(10, silent=False).row(10, ROW | rates)
    line = capsys.readouterr().out
    assert line.rstrip().endswith(f"100 img/s, data wait 25 % | consistency 0.5 | {shown}")


@pytest.mark.parametrize("silent", [False, True])
def test_a_signal_handler_prints_past_the_buffer(
    silent: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(10, silent=silent)
    console.print_in_signal_handler("stopping")
    assert capfd.readouterr().err == ("" if silent else "stopping\n")
    monkeypatch.setattr("sys.stderr", None)  # closed: its number may be that of another file
    console.print_in_signal_handler("stopping")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), OutputError("full")])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_error_of_the_output_ends_a_run(
    error: Exception,
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as of a terminal that is gone, or a full disk with the log."""

    class Broken(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            raise error

    def print_all(console: Console) -> None:
        console.print("line")
        console.progress(1)
        console.row(10, ROW | {"lr/learner": 0.1})
        console.warn("more")

    monkeypatch.setattr("sys.stdout", Broken())
    print_all(Console(10, silent=False))
    warning = f"the console's output is incomplete from here on: {error}"
    assert capsys.readouterr().err == f"warning: {warning}\nwarning: more\n"
    if isinstance(error, OSError):  # the other one is of stdout alone
        monkeypatch.setattr("sys.stderr", Broken())
    print_all(Console(10, silent=False))
    monkeypatch.setattr("sys.stdout", None)  # closed by the shell: >&-
    print_all(Console(10, silent=False))
