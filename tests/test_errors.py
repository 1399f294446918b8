"""Errors end a command with one line and an exit code."""

import ast
import errno
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import ConfigError, UserError, fail, printable, run_command
from tests.tiny_run import ROOT, TRAIN, write_digits


@pytest.mark.parametrize(("rank", "alone"), [("0", False), ("1", False), ("1", True)])
def test_the_rank_that_prints_an_error_ends_first(
    rank: str, alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise torchrun may end it before it has printed. On another machine than rank 0's, where
    alone a file may be missing, the first rank prints."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", str(8 + int(rank)))
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("time.sleep", waited.append)
    error = ConfigError("wrong")
    error.alone = alone
    with pytest.raises(SystemExit) as ended:
        fail("train", error)
    prints = rank == "0" or alone
    assert ended.value.code == 2 and bool(waited) is not prints
    assert capsys.readouterr().err == ("train: error: wrong\n" if prints else "")


@pytest.mark.parametrize(("interrupted", "printed"), [("", ""), ("saved", "train: saved\n")])
def test_ctrl_c_is_an_exit_code(
    interrupted: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command("train", command, interrupted)
    assert ended.value.code == 130 and capsys.readouterr().err == printed


@pytest.mark.parametrize(
    "command",
    [
        "mpl_fast/train.py --help",
        "mpl_fast/train.py --print-config",
        "tools/contact_sheet.py --help",
        "tools/demo.py --help",
        "tools/evaluate.py --help",
        "tools/make_rec.py --help",
        "tools/plot.py --help",
        "-m tools.bench",
        "-m tools.studies",
        "-m tools.studies.ablation --help",
        "-m tools.studies.cifar --help",
        "-m tools.studies.feedbacks --help",
        "-m tools.studies.two_moons --help",
    ],
)
def test_a_command_whose_stdout_is_closed_ends_as_usual(command: str) -> None:
    """As after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, *command.split()]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "code"), [("train.py --print-config", 0), ("train.py --sed=1", 2)]
)
def test_a_command_without_stdout_and_stderr_ends_as_usual(command: str, code: int) -> None:
    """As after `2>&1 | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, *command.split()]
    done = subprocess.run(line, stdout=writer, stderr=writer, cwd=ROOT / "mpl_fast", check=False)
    os.close(writer)
    assert done.returncode == code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_text_that_an_encoding_lacks_is_written_as_numbers(encoding: str, stream: str) -> None:
    """Names of files that are not UTF-8: on stdout as they are."""
    code = f"import sys; print('± 画 \\udcff', file=sys.{stream}, flush=True)"
    line = "from mpl_fast.errors import run_command; run_command('x', lambda: exec(code))"
    done = subprocess.run(
        [sys.executable, "-c", f"code = {code!r}; {line}"],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=True,
    )
    text = "± 画 ".encode(encoding, "backslashreplace")
    text += b"\xff\n" if stream == "stdout" else b"\\udcff\n"
    assert (done.stdout, done.stderr) == ((text, b"") if stream == "stdout" else (b"", text))


@pytest.mark.parametrize(("name", "shown"), [("RUN/x", "RUN/x"), (None, "a file")])
def test_an_error_of_the_disk_is_one_line_wherever_it_occurs(
    name: str | None, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    with pytest.raises(SystemExit) as ended:
        run_command("train", command)
    assert ended.value.code == 3
    assert capsys.readouterr().err == f"train: error: {shown}: Input/output error\n"


@pytest.mark.parametrize("option", ["--help", "--print-config"])
def test_a_stdout_that_cannot_be_written_is_one_line(option: str) -> None:
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, str(TRAIN), option]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "train: error: standard output: No space left on device\n"


def test_make_rec_prints_paths_in_any_encoding(tmp_path: Path) -> None:
    write_digits(tmp_path / "images", train=20, val=0)
    for name, printed in (("réc", rb"r\xe9c: 20 rec"), ("r\udcffc", b"r\xffc: 20 rec")):
        command = ["tools/make_rec.py", "pack", "--src", str(tmp_path / "images" / "train")]
        done = subprocess.run(
            [sys.executable, *command, "--labeled", "10", "--out", str(tmp_path / name), "-j", "1"],
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=False,
        )
        assert done.returncode == 0 and printed in done.stdout, done.stderr


EVIL = "\x1b]0;own\x07\x1b[31m\rx\x9b2J\x7f\u202egpj.\u2028y\tz\n"
ESCAPED = r"\x1b]0;own\x07\x1b[31m\rx\x9b2J\x7f\u202egpj.\u2028y\tz\n"
# Commands, by what each needs before it looks at a folder with a name from somewhere.
COMMANDS = {
    "mpl_fast/train.py": ["--config"],
    "tools/contact_sheet.py": ["rec", "--out", "x.png", "--config"],
    "tools/demo.py": [],
    "tools/evaluate.py": [],
    "tools/export.py": ["--out", "model.safetensors"],
    "tools/make_rec.py": ["verify"],
    "tools/plot.py": ["--out", "x.png"],
    "tools/predict.py": ["--out", "x.csv", "--keep", "0.5", EVIL],
    "tools/report.py": ["--out", "x.html"],
    "tools/status.py": [],
    "tools/sweep.py": ["--ranges", "x", "--out", "x", "--config"],
    "tools/bench/__main__.py": [],
    "tools/bench/__main__.py all": ["--only"],
    "tools/bench/__main__.py compare": [EVIL],
    "tools/bench/__main__.py input": ["--rec"],
    "tools/faults/__main__.py": ["--out", "x", "--recipes"],
    "tools/first_gpu/__main__.py": ["--rec"],
    "tools/studies/__main__.py": [],
    "tools/studies/ablation/__main__.py": ["--out", "x", "--config", "x", "--rec"],
    "tools/studies/cifar/__main__.py": ["--out", "x", "--src"],
    "tools/studies/feedbacks/__main__.py": ["--out", "x"],
    "tools/studies/two_moons/__main__.py": ["--out", "x"],
}


def test_printable() -> None:
    assert printable(EVIL) == ESCAPED
    assert printable("é 画 \U0001f41d \udcff \u200d") == "é 画 \U0001f41d \udcff \u200d"


def test_a_name_in_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("train", UserError(f"{EVIL}: no such file"))
    assert capsys.readouterr().err == f"train: error: {ESCAPED}: no such file\n"


def printed_by(command: Callable[[], object], file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command writes to stdout and stderr of its process, which are one file."""
    with file.open("w", encoding="utf-8", newline="") as stream, monkeypatch.context() as patch:
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit):
            command()
        sys.stderr.flush()
        sys.stdout.flush()
    return file.read_text(encoding="utf-8")


def test_a_name_on_a_stream_moves_no_cursor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of progress is replaced by the next one, as before."""
    name = EVIL.replace("\t", "").rstrip()

    def command() -> None:
        print(name)
        print(f"\r\x1b[Kstep 1 {name}", end="", flush=True)
        print("packed 1", end="\x1b[K\r")

    text = printed_by(lambda: run_command("x", command), tmp_path / "printed", monkeypatch)
    shown = printable(name)
    # In text mode \r is a line end.
    assert text == f"{shown}\n\n\x1b[Kstep 1 {shown}packed 1\x1b[K\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_escapes_what_it_names(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program by its path, or `python -m tools.NAME`."""
    path, *words = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *words, *COMMANDS[command], EVIL])
    module = path.removesuffix("/__main__.py").replace("/", ".")
    program: partial[dict[str, Any]] = partial(runpy.run_module, module, run_name="__main__")
    if module == path.replace("/", "."):
        program = partial(runpy.run_path, str(ROOT / path), run_name="__main__")
    text = printed_by(program, tmp_path / "printed", monkeypatch)
    assert ESCAPED[:20] in text
    assert not [c for c in text if c not in "\t\n" and not c.isprintable()]


def test_every_command_is_run_by_what_escapes() -> None:
    """All programs of the package and of tools/, by their source; and the list above has them."""
    found = {}
    modules = (ROOT.glob(f"{top}/**/__main__.py") for top in ("mpl_fast", "tools"))
    for file in chain(ROOT.glob("mpl_fast/*.py"), ROOT.glob("tools/*.py"), *modules):
        if '__name__ == "__main__"' in file.read_text():
            tree = ast.parse(file.read_text())
            calls = {ast.unparse(c.func) for c in ast.walk(tree) if isinstance(c, ast.Call)}
            found[str(file.relative_to(ROOT))] = bool(calls & {"run_command", "command.main"})
    assert [path for path, runs in found.items() if not runs] == []
    assert {*found} == {name.split()[0] for name in COMMANDS}
