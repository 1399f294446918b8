"""What all benchmarks share: turns, rows and their shares, files, exit codes, time, names."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.errors import ConfigError
from tests.tiny_run import ROOT
from tools.bench import __main__, clock, harness, limits, machine, results
from tools.bench.harness import Report
from tools.bench.results import Row, Spread

ONE = Spread(2.0, 1.0, 4.0, 3)


def no_options(parser: argparse.ArgumentParser) -> None:
    """None beside the common ones."""


def run(
    out: Path, measure: Callable[[Any, Report], None], *arguments: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and the file of a benchmark of this function."""
    given = ["--commit", "abc", "--out", str(out), *arguments]
    code = harness.run(
        "x", "First\nline.\n\nRest.", given, measure, no_options, rounds=3, tiny={"rounds": 1}
    )
    return code, json.loads(out.read_text()) if out.is_file() else {}


def order_of(seed: int) -> list[str]:
    turns: list[str] = []
    works = {name: (lambda name=name: turns.append(name)) for name in "abc"}
    found = clock.interleaved(works, clock.seconds_of, rounds=8, warmup=2, seed=seed)
    assert {name: len(times) for name, times in found.items()} == {"a": 8, "b": 8, "c": 8}
    return turns


def test_each_has_a_turn_in_every_round_in_changing_order() -> None:
    turns = order_of(seed=0)
    rounds = [turns[i : i + 3] for i in range(0, 30, 3)]
    assert len(turns) == 30
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert order_of(seed=0) == turns != order_of(seed=1)


def test_each_has_its_own_times_and_the_warm_ones_are_dropped() -> None:
    numbers = {"a": iter(range(9)), "b": iter(range(10, 19))}
    found = clock.interleaved(numbers, next, rounds=2, warmup=1)
    assert found == {"a": [1, 2], "b": [11, 12]}


def test_no_round_begins_after_the_time_but_one_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def work() -> None:
        now[0] += 1.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    works, timer = {"a": work, "b": work}, clock.seconds_of
    times = clock.interleaved(works, timer, rounds=100, warmup=1, seconds=7.0)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}  # 2 s of warming up, then rounds of 2 s
    assert clock.interleaved({"a": work}, timer, rounds=100, seconds=-1.0) == {"a": [1.0]}


def test_a_ratio_is_taken_round_by_round() -> None:
    found = {"slow": [2.0, 8.0, 3.0], "fast": [1.0, 2.0, 1.0]}
    assert results.ratios(found, "slow", "fast") == Spread(3.0, 2.0, 4.0, 3)
    with pytest.raises(ValueError, match="longer"):
        results.ratios({"slow": [1.0], "fast": [1.0, 2.0]}, "slow", "fast")


@pytest.mark.parametrize(
    ("found", "better", "limit", "share", "cell"),
    [
        (ONE, "higher", 8.0, 0.25, "25 %"),
        (ONE, "lower", 0.5, 0.25, "25 %"),
        (ONE, "lower", 2.0, 1.0, "100 %"),
        (ONE, "lower", 0.0, 0.0, "0.0 %"),
        (results.spread([0.0]), "lower", 0.0, 1.0, "100 %"),
        (results.spread([0.0]), "lower", 3.0, None, ""),
        (results.spread([0.0]), "higher", 0.0, 1.0, "100 %"),
    ],
)
def test_share_of_the_limit(
    found: Spread, better: str, limit: float, share: float | None, cell: str
) -> None:
    row = results.row_json(Row("r", found, "ms", better, limit=limit))
    assert row["share_of_limit"] == (share if share is None else pytest.approx(share))
    assert f" | {found.n} | {cell} |" in results.table([row])


def test_the_table_says_what_is_met() -> None:
    rows = [
        Row("speed", Spread(2500.0, 1.25, 3000.0, 5), "img/s", "higher", limit=5e4, target=3000.0),
        Row("time", Spread(0.01234, 0.01, 20.0, 5), "ms", target=0.5),
        Row("broken", Spread(float("inf"), 1.0, float("nan"), 1), "ms"),
    ]
    found = [results.row_json(row) for row in rows]
    assert [row.get("met") for row in found] == [False, True, None]
    lines = results.table(found).splitlines()[2:]
    assert lines[0] == "| speed | 2,500 img/s (1.25 to 3,000) | 5 | 5.0 % | ≥ 3,000: **missed** |"
    assert lines[1] == "| time | 0.0123 ms (0.01 to 20) | 5 |  | ≤ 0.5: met |"
    assert lines[2] == "| broken | inf ms (1 to nan) | 1 |  |  |"


def test_a_run_writes_the_form_and_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(options: Any, report: Report) -> None:
        report.claim, report.more["settled"] = "fast", {"copy": 1.0}
        report.add([Row("r", ONE, "ms")])
        report.skipped.append("no time: s")

    code, found = run(tmp_path / "out.json", measure)
    assert code == 0
    assert (found["form"], found["bench"], found["claim"]) == ("mpl_fast.bench/1", "x", "fast")
    assert found["machine"]["commit"] == "abc"
    assert found["settings"]["rounds"] == "3"
    assert (found["rows"][0]["median"], found["settled"]) == (2.0, {"copy": 1.0})
    least = {name for name in limits.UNITS if name not in (limits.DIRECT, limits.HOST_COPY)}
    assert least <= {row["name"] for row in found["limits"]}
    assert all(row["low"] > 0 for row in found["limits"])
    printed = capsys.readouterr().out
    assert "Limits of this machine" in printed and f"| {limits.HASH} | " in printed
    assert "| r | 2 ms (1 to 4) | 3 |  |  |" in printed
    assert "left out: no time: s" in printed
    _, found = run(tmp_path / "out.json", measure, "--smoke")
    assert found["settings"]["rounds"] == "1"  # the tiny options
    assert "no number here is a claim" in found["claim"]


def test_what_fails_is_exit_code_1_and_what_was_added_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(options: Any, report: Report) -> None:
        report.add([Row("r", ONE, "ms")])
        with report.attempt("b"):
            raise ValueError("off\nby 1")
        report.fail("c", "off by 2")

    code, found = run(tmp_path / "a.json", wrong)
    failed = {"b": "ValueError: off by 1", "c": "off by 2"}
    assert (code, found["failed"], len(found["rows"])) == (1, failed, 1)

    def lost() -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(harness, "wait_for_gpu", lost)
    code, found = run(tmp_path / "b.json", wrong)
    failed = {"b": failed["b"]}
    failed["the GPU"] = "the device is unusable: RuntimeError: illegal memory access"
    assert (code, found["failed"], len(found["rows"])) == (3, failed, 1)


def test_what_is_interrupted_leaves_what_was_found(tmp_path: Path) -> None:
    def slow(options: argparse.Namespace, report: Report) -> None:
        report.fail("a", "off by 3")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out.json", slow)
    assert json.loads((tmp_path / "out.json").read_text())["failed"] == {"a": "off by 3"}


def test_a_user_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(options: Any, report: Report) -> None:
        with report.attempt("x"):
            raise ConfigError("--x: no")

    assert run(tmp_path / "out.json", refused) == (2, {})
    assert capsys.readouterr().err == "tools.bench x: error: --x: no\n"
    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path / "file" / "out.json", "file"), (tmp_path, "is a folder")):
        assert run(place, refused)[0] == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error


def test_a_file_is_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out.json"
    harness.require_writable(out)
    assert list(out.parent.iterdir()) == []
    assert run(out, lambda options, report: report.add([Row("r", ONE, "ms")]))[0] == 0

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, found = run(out, lambda options, report: report.add([Row("s", ONE, "ms")]))
    assert code == 2
    assert "No space left" in capsys.readouterr().err
    assert [row["name"] for row in found["rows"]] == ["r"]
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    for given, left in ((["--minutes", "2"], 60.0), ([], float("inf"))):
        assert Report("x", harness.parse("x", "D", given, no_options, 3)).seconds_left(2) == left


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["cores"] >= 1
    assert found["commit"] not in ("", None)
    assert isinstance(found["cpu"], str)


def test_limits_are_of_what_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_second(work: Callable[[], Any]) -> float:
        work()
        return 1.0

    monkeypatch.setattr(limits, "seconds_of", one_second)
    found = limits.Limits(tmp_path, torch.device("cpu"), small=True)
    product = 2.0 * 256**3
    assert found.rates[limits.BF16] == Spread(product, product, product, limits.ROUNDS)
    assert found.best(limits.COPY) == 2e6 and found.best(limits.DECODE) == 1
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # as where it is not installed
    without = limits.Limits(tmp_path, torch.device("cpu"), small=True)
    assert {*found.rates} - {*without.rates} == {limits.DECODE}
    assert found.best(limits.WRITE) == 1 << 20 and found.best(limits.HASH) == 1 << 18
    assert not [*tmp_path.iterdir()]
    shown = {row.name: (row.found.median, row.unit) for row in found.rows()}
    assert shown[limits.COPY] == (2e-3, "GB/s") and limits.HOST_COPY not in shown


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == machine.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda"):
        machine.choose_device("cuda")


def test_every_name_is_a_benchmark_and_others_are_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in __main__.NAMES:
        assert callable(import_module(f"tools.bench.{name}").main)
    assert __main__.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in __main__.NAMES)
    assert __main__.main(["bench"]) == 2
    assert "there is no benchmark 'bench'" in capsys.readouterr().err


def test_the_list_imports_no_torch() -> None:
    code = (
        "import sys; from tools.bench.__main__ import main; main([]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
