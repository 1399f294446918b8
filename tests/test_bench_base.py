"""What all benchmarks share: turns, ratios, rows and their shares, the file, counts of traffic."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.errors import ConfigError, OutputError
from tools.bench import clock, device, limits, machine, report
from tools.bench.clock import Spread
from tools.bench.report import Row
from tools.bench.traffic import traffic

ONE = Spread(2.0, 1.0, 4.0, 3)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_options(parser, "bench_x", rounds=3)
    return parser.parse_args(["--commit", "abc", *arguments])


def order_of(seed: int, rounds: int, warmup: int) -> tuple[list[str], dict[str, list[float]]]:
    """Who had a turn when, and the times."""
    turns: list[str] = []

    def work(name: str) -> Callable[[], None]:
        return lambda: turns.append(name)

    works = {name: work(name) for name in "abc"}
    return turns, clock.interleaved(works, rounds=rounds, warmup=warmup, seed=seed)


def test_each_has_a_turn_in_every_round_in_changing_order() -> None:
    turns, times = order_of(seed=0, rounds=8, warmup=2)
    rounds = [turns[i : i + 3] for i in range(0, 30, 3)]
    assert len(turns) == 30
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert {name: len(found) for name, found in times.items()} == {"a": 8, "b": 8, "c": 8}
    assert order_of(seed=0, rounds=8, warmup=2)[0] == turns
    assert order_of(seed=1, rounds=8, warmup=2)[0] != turns


def test_no_round_begins_after_the_time_but_one_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def work() -> None:
        now[0] += 1.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    times = clock.interleaved({"a": work, "b": work}, rounds=100, warmup=1, seconds=7.0)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}  # 2 s of warming up, then rounds of 2 s
    times = clock.interleaved({"a": work}, rounds=100, seconds=-1.0)
    assert times == {"a": [1.0]}


def test_a_ratio_is_taken_round_by_round() -> None:
    found = {"slow": [2.0, 8.0, 3.0], "fast": [1.0, 2.0, 1.0]}
    assert clock.ratio(found, "slow", "fast") == Spread(3.0, 2.0, 4.0, 3)
    with pytest.raises(ValueError, match="longer"):
        clock.ratio({"slow": [1.0], "fast": [1.0, 2.0]}, "slow", "fast")


@pytest.mark.parametrize(
    ("better", "limit", "share"),
    [("higher", 8.0, 0.25), ("lower", 0.5, 0.25), ("lower", 2.0, 1.0), ("lower", 0.0, 0.0)],
)
def test_share_of_the_limit(better: str, limit: float, share: float) -> None:
    (row,) = report.result("x", options(), "", [Row("r", ONE, "ms", better, limit=limit)])["rows"]
    assert row["share_of_limit"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("better", "limit", "share"), [("lower", 0.0, 1.0), ("lower", 3.0, None), ("higher", 0.0, 1.0)]
)
def test_a_count_of_nothing(better: str, limit: float, share: float | None) -> None:
    nothing = Row("syncs", Spread(0.0, 0.0, 0.0, 1), "syncs", better, steady=True, limit=limit)
    (row,) = report.result("x", options(), "", [nothing])["rows"]
    assert row["share_of_limit"] == share
    cell = "" if share is None else "100 %"
    assert f"| syncs | 0 syncs (0 to 0) | 1 | {cell} |" in report.table([row])


def test_the_table_says_what_is_met() -> None:
    rows = [
        Row("speed", Spread(2500.0, 1.25, 3000.0, 5), "img/s", "higher", limit=5e4, target=3000.0),
        Row("time", Spread(0.01234, 0.01, 20.0, 5), "ms", target=0.5),
        Row("broken", Spread(float("inf"), 1.0, float("nan"), 1), "ms"),
    ]
    found = report.result("x", options(), "", rows)["rows"]
    assert [row.get("met") for row in found] == [False, True, None]
    lines = report.table(found).splitlines()[2:]
    assert lines[0] == ("| speed | 2,500 img/s (1.25 to 3,000) | 5 | 5.0 % | ≥ 3,000: **missed** |")
    assert lines[1] == "| time | 0.0123 ms (0.01 to 20) | 5 |  | ≤ 0.5: met |"
    assert lines[2] == "| broken | inf ms (1 to nan) | 1 |  |  |"


def test_a_smoke_test_claims_nothing() -> None:
    assert (
        "no number here is a claim" in report.result("x", options("--smoke"), "fast", [])["claim"]
    )
    found = report.result("x", options(), "fast", [])
    assert found["claim"] == "fast"
    assert found["form"] == "mpl_fast.bench/1"
    assert found["machine"]["commit"] == "abc"
    assert found["settings"]["rounds"] == "3"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "out.json"
    report.prepare(out)
    assert not out.exists()
    report.write({"a": 1}, out)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        report.write({"a": 2}, out)
    assert json.loads(out.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        report.write({"a": object()}, out)
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_where_nothing_can_be_written_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file"):
        report.prepare(tmp_path / "file" / "out.json")
    with pytest.raises(OutputError, match="is a folder"):
        report.prepare(tmp_path)


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["cores"] >= 1
    assert found["commit"] not in ("", None)
    assert isinstance(found["cpu"], str)


def test_limits_are_of_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_second(work: Callable[[], Any]) -> float:
        work()
        return 1.0

    monkeypatch.setattr(limits, "seconds_of", one_second)
    cpu = torch.device("cpu")
    found = limits.products(cpu, torch.bfloat16, small=True)
    assert found == Spread(2.0 * 256**3, 2.0 * 256**3, 2.0 * 256**3, limits.ROUNDS)
    assert limits.copies(cpu, small=True).median == 2e6


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.chosen("auto") == device.chosen("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda"):
        device.chosen("cuda")


@pytest.mark.parametrize(
    ("work", "calls", "numbers"),
    [
        (lambda a, b: a + b, 1, 300),
        (lambda a, b: a.add_(b), 1, 300),  # read both, write one
        (lambda a, b: a.copy_(b), 1, 200),
        (lambda a, b: a.zero_(), 1, 100),
        (lambda a, b: a.view(10, 10).t()[0], 0, 0),
        (lambda a, b: torch._foreach_lerp_([a, a], [b, b], 0.5), 1, 600),
        (lambda a, b: torch._foreach_copy_([a, a], [b, b]), 1, 400),
        (lambda a, b: a.sum(), 1, 101),
        (lambda a, b: a[:1].expand(100) + b, 1, 201),
    ],
)
def test_traffic_counts_what_is_read_and_written(
    work: Callable[[torch.Tensor, torch.Tensor], Any], calls: int, numbers: int
) -> None:
    a, b = torch.ones(100), torch.ones(100)
    assert traffic(lambda: work(a, b)) == (calls, 4 * numbers)
