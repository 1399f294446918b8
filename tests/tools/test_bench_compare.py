"""Two results of a benchmark compared: what counts as a regression, and what cannot be compared."""

import copy
import json
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


WORSE, BETTER, SAME = ("**worse**", True), ("better", False), ("same", False)
HIGHER = {"better": "higher"}
OVERLAP = ("ranges overlap", False)


@pytest.mark.parametrize(
    ("before", "old", "after", "new", "expected"),
    [
        (10.0, {}, 10.0, {}, SAME),
        (10.0, {}, 10.4, {}, SAME),
        (10.0, {}, 11.0, {}, WORSE),
        (10.0, {}, 9.0, {}, BETTER),
        (10.0, {}, 11.0, {"low": 10.1}, OVERLAP),  # the old one's highest
        (10.0, {}, 11.0, {"low": 10.11}, WORSE),
        (10.0, {}, 9.0, {"high": 9.9}, OVERLAP),
        (10.0, {}, 9.0, HIGHER, BETTER),  # the old row determines which is better
        (10.0, HIGHER, 11.0, HIGHER, BETTER),
        (10.0, HIGHER, 9.0, HIGHER, WORSE),
        (0.0, {}, 1.0, {}, WORSE),  # the first of what should be none
        (1.0, {}, 0.0, {}, BETTER),
        (0.0, {}, 0.0, {}, SAME),
    ],
)
def test_a_change_counts_beyond_tolerance_and_ranges(
    before: float, old: Json, after: float, new: Json, expected: tuple[str, bool]
) -> None:
    first, second = result(row("a", before, **old)), result(row("a", after, **new))
    assert verdicts(first, second) == [expected]
    if before and after:
        assert verdicts(first, second, 0.2) == [SAME]


RATIO_ONLY = [("not gated", False), WORSE, ("missing, not gated", False)]
NOTHING = [("not gated", False), ("not gated", False), ("missing, not gated", False)]
ALL = [WORSE, WORSE, ("**missing**", True)]


@pytest.mark.parametrize(
    ("part", "key", "value", "expected", "words"),
    [
        ("machine", "cpu", "slow", RATIO_ONLY, "not gated: cpu: fast and slow."),
        ("machine", "gpu", "H100", RATIO_ONLY, "not gated: gpu: None and H100."),
        ("machine", "cores", 4, RATIO_ONLY, "not gated: cores: 2 and 4."),
        ("settings", "batch", "32", NOTHING, "NOTHING is gated: --batch: 64 and 32."),
        ("settings", "smoke", "True", NOTHING, "NOTHING is gated: --smoke: False and True."),
        ("settings", "image_size", "8", NOTHING, "NOTHING is gated: --image-size: None and 8."),
        *[
            ("settings", key, "z", ALL, "")
            for key in ("out", "seed", "commit", "minutes", "rounds")
        ],
    ],
)
def test_gated_is_what_was_measured_on_equal_terms(
    part: str,
    key: str,
    value: Any,
    expected: Any,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = result(row("time", 1.0), row("ratio", 1.0, steady=True), row("gone", 1.0))
    new = copy.deepcopy(result(row("time", 2.0), row("ratio", 2.0, steady=True)))
    new[part][key] = value
    assert verdicts(old, new) == expected
    files = [str(save(tmp_path, f"{n}.json", r)) for n, r in (("old", old), ("new", new))]
    assert compare.main(files) == int(any(fails for _, fails in expected))
    assert words in capsys.readouterr().out


def test_smoke_tests_are_gated_by_their_counts() -> None:
    old = result(row("time", 1.0), row("calls", 1.0, steady=True))
    old["settings"]["smoke"] = "True"
    new = {**old, "rows": [row("time", 2.0), row("calls", 2.0, steady=True)]}
    assert verdicts(old, new) == [("not gated", False), WORSE]


def test_rows_that_are_missing_fail_and_new_ones_are_listed() -> None:
    old = result(row("a", 1.0), row("b", 1.0, unit="s"))
    new = result(row("b", 1.0), row("c", 1.0))
    missing, added = ("**missing**", True), ("new", False)
    assert verdicts(old, new) == [missing, missing, added, added]  # another unit: another row


def test_the_exit_code_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = str(save(tmp_path, "old.json", result(row("a", 1000.0), row("b", 2.0))))
    new = str(save(tmp_path, "new.json", result(row("a", 1200.0), row("b", 2.0))))
    assert compare.main([old, new]) == 1
    printed = capsys.readouterr().out
    assert "| a | 1,000 ms | 1,200 ms | -20.0 % | **worse** |" in printed
    assert "| b | 2 ms | 2 ms | +0.0 % | same |" in printed
    assert "rows that fail: 1" in printed
    assert compare.main([old, new, "--tolerance", "25%"]) == 0
    assert compare.main([new, old, "--tolerance", "0.1"]) == 0


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        save(folder, "same.json", result(row("a", 1.0)))
        save(folder, "other.json", [1, 2])
    assert compare.main([str(old), str(new)]) == 0
    save(old, "gone.json", result(row("a", 1.0)))
    assert compare.main([str(old), str(new)]) == 0  # whose machine is unknown
    save(new, "more.json", result())
    save(old, "gone.json", result(row("a", 1.0), row("count", 3.0, steady=True)))
    assert compare.main([str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "| count | 3 ms |  |  | **missing** |" in printed
    assert "| a | 1 ms |  |  | missing, not gated |" in printed
    assert "more.json is new" in printed
    assert compare.main([str(old / "same.json"), str(new)]) == 2  # a file and a folder


@pytest.mark.parametrize(
    ("content", "options", "word"),
    [
        (None, [], "new.json: no such file or folder"),
        ("{", [], "new.json cannot be read as JSON"),
        ([1], [], "new.json have no result of the same benchmark"),
        ({**result(), "form": "other"}, [], "new.json have no result of the same benchmark"),
        ({**result(), "bench": "y"}, [], "new.json have no result of the same benchmark"),
        ({**result(), "rows": None}, [], "new.json is damaged: it has no rows"),
        ({**result(), "machine": None}, [], "new.json is damaged: it has no machine"),
        (result({"name": "a"}), [], "new.json is damaged: a row lacks a part"),
        (result(row("a", float("nan"))), [], "new.json is damaged: row 'a' has no finite number"),
        (result(row("a", 1.0, low=None)), [], "new.json is damaged: row 'a' has no finite number"),
        (result(row("a", 1.0), row("a", 2.0)), [], "new.json is damaged: it has two rows 'a'"),
        (result(), ["--tolerance", "5"], "--tolerance 5: write a share"),
        (result(), ["--tolerance", "much"], "--tolerance much: write a share"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    content: Any, options: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = save(tmp_path, "old.json", result()), tmp_path / "new.json"
    if content:
        save(tmp_path, "new.json", content)
    assert compare.main([str(old), str(new), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.bench compare: error: ") and word in line


def test_every_published_result_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "docs" / "benchmarks"
    assert compare.main([str(folder), str(folder)]) == 0
    printed = capsys.readouterr().out
    published = sorted(folder.glob("*.json"))
    assert len(published) > 8
    assert all(f"## {file.name}\n" in printed for file in published)
