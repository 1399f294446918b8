"""The fault campaign: it goes on where it was, finds what differs, and its table has real tests."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.tiny_run import ROOT, run_here
from tools.faults import commands, named, training
from tools.faults.__main__ import main
from tools.faults.cases import Campaign, Case, counts, read_cases
from tools.faults.processes import Used
from tools.faults.soak import growth


def test_every_fault_of_the_page_has_a_test() -> None:
    found = named.faults()
    assert len(found) > 50
    for test in found.values():
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(), test


def test_every_row_of_the_page_is_a_fault() -> None:
    """Also one with a mistake in its last cell."""
    faults, _, results = named.DOCUMENT.read_text().partition("\n## The campaign\n")
    rows = [r for r in faults.splitlines() if r.startswith("| ")]
    assert results
    rows = [row for row in rows if not row.startswith(("| ---", "| threat ", "| fault "))]
    assert len(rows) == len(named.faults())


def test_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def case(name: str, kills: int = 2, outcome: str = "passed") -> Case:
        ran.append(name)
        return Case(name, "kills", outcome, 1.0, kills)

    first = Campaign(tmp_path, minutes=60)
    for name in ("one", "two"):
        first.run(name, lambda name=name: case(name))  # type: ignore[misc]
    with (tmp_path / "cases.jsonl").open("a") as file:
        file.write('{"name": "cut by a ki')
    second = Campaign(tmp_path, minutes=60)
    assert second.kills("kills") == 4 and second.kills("packing") == 0
    for name in ("one", "two", "three"):
        outcome = "failed" if name == "three" else "passed"
        second.run(name, lambda name=name, o=outcome: case(name, 1, o))  # type: ignore[misc]
    assert ran == ["one", "two", "three"]
    assert [*read_cases(tmp_path / "cases.jsonl")] == ran
    result = second.result()
    assert result["counts"] == {"kills": {"passed": 2, "failed": 1, "skipped": 0, "kills": 5}}
    assert [failed["name"] for failed in result["failed"]] == ["three"]
    assert json.loads((tmp_path / "result.json").read_text())["counts"] == result["counts"]
    third = Campaign(tmp_path, minutes=0)
    assert third.run("four", lambda: case("four")) is None and "four" not in ran
    assert counts([]) == {}


def test_one_bit_is_a_difference() -> None:
    one = {"a": [torch.zeros(3), {"b": 1.0}], "train_seconds": 1.0, "c": b"x"}
    same = {"a": [torch.zeros(3), {"b": 1.0}], "train_seconds": 2.0, "c": b"x"}
    assert training.unequal(one, same) == []
    nan = {"a": torch.tensor([float("nan")])}
    assert training.unequal(nan, {"a": torch.tensor([float("nan")])}) == []
    others = [
        ({**same, "c": b"y"}, "c"),
        ({**same, "a": [-torch.zeros(3), {"b": 1.0}]}, "a[0]"),
        ({**same, "a": [torch.zeros(3).double(), {"b": 1.0}]}, "a[0]"),
        ({**same, "a": [torch.zeros(3), {"b": 1}]}, "a[1].b"),
        ({**same, "d": 0}, ".d"),
    ]
    for other, name in others:
        assert training.unequal(one, other) == [name]


def test_the_plan_of_kills_is_the_same_each_time_and_has_everything() -> None:
    plans = [training.plan(0, (1, 2), ("mpl", "uda")) for _ in range(2)]
    cases = [[next(plan) for _ in range(100)] for plan in plans]
    assert cases[0] == cases[1]
    drawn = [kill for case in cases[0] for kill in case["kills"]]
    assert {kill["target"] for kill in drawn} == {*training.TARGETS}
    assert {kill["phase"] for kill in drawn} == {*training.PHASES}
    assert {(case["recipe"], case["ranks"][0]) for case in cases[0]} == {
        (recipe, ranks) for recipe in ("mpl", "uda") for ranks in (1, 2)
    }
    assert all(len(case["ranks"]) == len(case["kills"]) + 1 for case in cases[0])
    changing = [case for case in cases[0] if len({*case["ranks"]}) > 1]
    assert 10 < len(changing) < 40


MB = 1 << 20
GROWING: dict[str, tuple[Callable[[int], Used], str]] = {
    "memory": (lambda at: Used((500 + at) * MB, 30, 9), "memory grew by "),
    "files": (lambda at: Used(500 * MB, 30 + at // 5, 9), "files grew from"),
    "one file": (lambda at: Used(500 * MB, 30 + (at >= 60), 9), "files grew from 30 to 31"),
    "threads": (lambda at: Used(500 * MB, 30, 9 + at // 10), "threads grew from"),
}


@pytest.mark.parametrize("kind", GROWING)
def test_what_grows_is_found(kind: str) -> None:
    sample, fault = GROWING[kind]
    (found,) = growth([sample(at) for at in range(90)], 1000)
    assert found.startswith(fault)


def test_what_comes_and_goes_does_not_grow() -> None:
    flat = [Used((500 + 5 * (at % 3)) * MB, 30 + at % 2, 9 + at % 2) for at in range(90)]
    warming = [Used((100 + 10 * at) * MB, at, at) for at in range(30)]
    assert growth(flat, 1000) == [] and growth(warming + flat[:60], 1000) == []
    assert "only 3 samples" in growth(flat[:3], 1000)[0]


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    for option in (["--only", "no such fault"], ["--recipes", "x"], ["--kills", "0"]):
        with pytest.raises(Exception, match=f"{option[0]}"):
            run_here(main, ["--out", str(tmp_path / "out"), *option])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_campaign(tmp_path: Path) -> None:
    """One kill of a run and one of a pack, in processes as users have them."""
    out = tmp_path / "out"
    words = ["--out", str(out), "--kills", "1", "--ranks", "1", "--recipes", "supervised"]
    words += ["--seed", "13"]  # whose first cases have one kill each
    for _ in range(2):  # the second time, nothing is left to do
        done = run_here(lambda: exit(main()), [*words, "--only", "packing;kills"])
        assert done.returncode == 0, done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["failed"] == []
    for kind in ("kills", "packing"):
        assert result["counts"][kind]["kills"] >= 1 and result["counts"][kind]["passed"] >= 1
    assert "passed kill" not in done.stdout and "kills: 1 passed, 0 failed" in done.stdout
    assert asdict(read_cases(out / "cases.jsonl")["kill 0000"])["outcome"] == "passed"


INJECTED = [
    "SIGSTOP of a rank",
    "a disk that is full for a second",
    "a terminal that is closed",
    "records that are cut short",
]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", INJECTED)
def test_a_command_with_a_fault(name: str, tiny_rec: Path, tmp_path: Path) -> None:
    """Others are part of the campaign only."""
    case = commands.one_case(tmp_path, tiny_rec, name, commands.FAULTS[name])
    if case.outcome == "skipped":
        pytest.skip(case.reason)
    assert case.outcome == "passed", case.reason


@pytest.mark.slow
@pytest.mark.nightly
def test_a_command_that_ends_in_another_way_is_found(tiny_rec: Path, tmp_path: Path) -> None:
    fault = commands.FAULTS["SIGTERM"]._replace(code=0, prints="no such line", state="dead")
    case = commands.one_case(tmp_path, tiny_rec, "x", fault)
    assert case.reason == (
        "the command ended with 75, not 0; it has not printed no such line; its status is "
        "stopped, not dead"
    )
