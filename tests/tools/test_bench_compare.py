"""Two results of a benchmark compared: what counts as a regression, and what cannot be compared."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import ROOT
from tools.bench import compare

Json = dict[str, Any]


def row(name: str, median: float, **other: Any) -> Json:
    found = {"name": name, "unit": "ms", "better": "lower", "steady": False}
    return {**found, "median": median, "low": 0.99 * median, "high": 1.01 * median, **other}


def result(*rows: Json, **other: Any) -> Json:
    machine = {"cpu": "fast", "gpu": None, "cores": 2}
    settings = {"batch": "64", "smoke": "False", "out": "a.json", "seed": "0"}
    found = {"form": "mpl_fast.bench/1", "bench": "x", "machine": machine, "settings": settings}
    return {**found, "rows": list(rows), **other}


def verdicts(old: Json, new: Json, tolerance: float = 0.05) -> list[tuple[str, bool]]:
    return [(c.verdict, c.fails) for c in compare.compared(old, new, tolerance)]


def save(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


@pytest.mark.parametrize(
    ("median", "other", "verdict", "fails"),
    [
        (10.0, {}, "same", False),
        (10.4, {}, "same", False),
        (11.0, {}, "**worse**", True),
        (9.0, {}, "better", False),
        (11.0, {"low": 10.1}, "ranges overlap", False),  # the old one's highest
        (11.0, {"low": 10.11}, "**worse**", True),
        (9.0, {"high": 9.9}, "ranges overlap", False),
        (9.0, {"better": "higher"}, "better", False),  # the old row says which is better
    ],
)
def test_a_change_counts_beyond_tolerance_and_ranges(
    median: float, other: Json, verdict: str, fails: bool
) -> None:
    old, new = result(row("a", 10.0)), result(row("a", median, **other))
    assert verdicts(old, new) == [(verdict, fails)]


def test_higher_may_be_better() -> None:
    old = result(row("a", 100.0, better="higher"))
    assert verdicts(old, result(row("a", 90.0, better="higher"))) == [("**worse**", True)]
    assert verdicts(old, result(row("a", 110.0, better="higher"))) == [("better", False)]
    assert verdicts(old, result(row("a", 90.0, better="higher")), 0.2) == [("same", False)]


def test_the_first_of_what_should_be_none_counts() -> None:
    none = row("syncs", 0.0, steady=True)
    one = row("syncs", 1.0, low=1.0, high=1.0, steady=True)
    assert verdicts(result(none), result(one)) == [("**worse**", True)]
    assert verdicts(result(one), result(none)) == [("better", False)]
    assert verdicts(result(none), result(none)) == [("same", False)]


@pytest.mark.parametrize(
    ("part", "key", "value", "why"),
    [
        ("machine", "cpu", "slow", "cpu: fast and slow"),
        ("machine", "gpu", "H100", "gpu: None and H100"),
        ("machine", "cores", 4, "cores: 2 and 4"),
    ],
)
def test_times_are_gated_on_equal_terms_only(part: str, key: str, value: Any, why: str) -> None:
    old = result(row("time", 1.0), row("ratio", 1.0, steady=True), row("gone", 1.0))
    new = copy.deepcopy(result(row("time", 2.0), row("ratio", 2.0, steady=True)))
    new[part][key] = value
    assert compare.differences(old, new) == [why]
    expected = [("not gated", False), ("**worse**", True), ("missing, not gated", False)]
    assert verdicts(old, new) == expected


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("batch", "32", "--batch: 64 and 32"),
        ("smoke", "True", "--smoke: False and True"),
        ("image_size", "8", "--image-size: None and 8"),
    ],
)
def test_nothing_is_gated_where_other_things_were_measured(
    key: str, value: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = result(row("calls", 1.0, steady=True)), result(row("calls", 2.0, steady=True))
    new["settings"] = {**new["settings"], key: value}
    assert compare.other_settings(old, new) == [why]
    assert verdicts(old, new) == [("not gated", False)]
    files = [str(save(tmp_path, f"{n}.json", r)) for n, r in (("old", old), ("new", new))]
    assert compare.main(files) == 0
    assert f"NOTHING is gated, for these are two things: {why}." in capsys.readouterr().out


def test_smoke_tests_are_gated_by_their_counts() -> None:
    old = result(row("time", 1.0), row("calls", 1.0, steady=True))
    old["settings"] = {**old["settings"], "smoke": "True"}
    new = copy.deepcopy(old)
    new["rows"] = result(row("time", 2.0), row("calls", 2.0, steady=True))["rows"]
    assert verdicts(old, new) == [("not gated", False), ("**worse**", True)]


@pytest.mark.parametrize("key", ["out", "seed", "commit", "minutes", "rounds"])
def test_what_does_not_change_the_work_does_not_matter(key: str) -> None:
    new = result()
    new["settings"] = {**new["settings"], key: "other"}
    assert compare.differences(result(), new) == []


def test_rows_that_are_missing_fail_and_new_ones_are_listed() -> None:
    old = result(row("a", 1.0), row("b", 1.0, unit="s"))
    new = result(row("b", 1.0), row("c", 1.0))
    expected = [("**missing**", True), ("**missing**", True), ("new", False), ("new", False)]
    assert verdicts(old, new) == expected  # another unit is another row


def test_the_exit_code_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = save(tmp_path, "old.json", result(row("a", 1000.0), row("b", 2.0)))
    new = save(tmp_path, "new.json", result(row("a", 1200.0), row("b", 2.0)))
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "| a | 1,000 ms | 1,200 ms | -20.0 % | **worse** |" in printed
    assert "| b | 2 ms | 2 ms | +0.0 % | same |" in printed
    assert "rows that fail: 1" in printed
    assert compare.main([str(old), str(new), "--tolerance", "25%"]) == 0
    assert compare.main([str(new), str(old), "--tolerance", "0.1"]) == 0


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    steady = row("count", 3.0, steady=True)
    for folder in (old, new):
        save(folder, "same.json", result(row("a", 1.0)))
        save(folder, "other.json", [1, 2])
        save(folder, "notes.txt", "no JSON")
    assert compare.main([str(old), str(new)]) == 0
    save(old, "gone.json", result(row("a", 1.0)))
    assert compare.main([str(old), str(new)]) == 0  # whose machine is unknown
    save(new, "more.json", result())
    capsys.readouterr()
    save(old, "gone.json", result(row("a", 1.0), steady))
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "| count | 3 ms |  |  | **missing** |" in printed
    assert "| a | 1 ms |  |  | missing, not gated |" in printed
    assert "more.json is new" in printed


def without(key: str) -> Json:
    found = result(row("a", 1.0))
    del found[key]
    return found


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "cannot be read as JSON"),
        ([1], "no result of a benchmark"),
        ({**result(), "form": "other"}, "no result of a benchmark"),
        (without("rows"), "it has no rows"),
        (without("machine"), "it has no machine"),
        (result({"name": "a"}), "a row lacks a part"),
        (result(row("a", float("nan"))), "'a' has no finite number"),
        (result(row("a", 1.0, low=None)), "'a' has no finite number"),
        (result(row("a", 1.0), row("a", 2.0)), "two rows 'a'"),
        ({**result(), "bench": "y"}, "is of y, the old result of x"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    content: Any, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = save(tmp_path, "old.json", result())
    new = save(tmp_path, "new.json", content)
    assert compare.main([str(old), str(new)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.bench compare: ")
    assert word in line
    assert "new.json" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (lambda f: [f / "a.json", f / "none.json"], "there is no"),
        (lambda f: [f / "a.json", f / "empty"], "two files, or two folders"),
        (lambda f: [f, f / "empty"], "under the same name"),
        (lambda f: [f, f, "--tolerance", "5"], "--tolerance 5: write a share"),
        (lambda f: [f, f, "--tolerance", "much"], "--tolerance much: write a share"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: Callable[[Path], list[Any]],
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path, "a.json", result())
    (tmp_path / "empty").mkdir()
    assert compare.main([str(a) for a in arguments(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_every_published_result_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "docs" / "benchmarks"
    assert compare.main([str(folder), str(folder)]) == 0
    printed = capsys.readouterr().out
    published = sorted(folder.glob("*.json"))
    assert len(published) > 8
    assert all(f"## {file.name}\n" in printed for file in published)
