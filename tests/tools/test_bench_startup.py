"""The benchmark of starting times its processes to the right moment; no time is looked at."""

import json
from pathlib import Path

import pytest

from tests.tiny_run import rows as metrics
from tools.bench import startup


@pytest.mark.nightly
@pytest.mark.slow
def test_smoke_measures_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, train = tmp_path / "deep" / "startup.json", startup.Starts._until
    compiled: list[set[str]] = []  # libraries in the caches after each start

    def noting(self: startup.Starts, step: int, run: Path, mode: str, caches: Path) -> float:
        seconds = train(self, step, run, mode, caches)
        compiled.append({file.name for file in caches.rglob("*.so")})
        steps = [row["step"] for row in metrics(run)]
        assert steps == list(range(1, step + 1))
        return seconds

    monkeypatch.setattr(startup.Starts, "_until", noting)
    assert startup.main(["--smoke", "--out", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "--help",
        "first step, not compiled",
        "first step, compiled cold",
        "first step, compiled warm",
        "resume to the next step, warm",
    ]
    assert all(row["n"] == 1 and row["median"] > 0 for row in rows.values())
    assert rows["--help"]["target"] == 0.5
    assert "first step, compiled warm" in capsys.readouterr().out
    plain, cold, warm, resume = compiled
    assert not plain and cold  # on a CPU
    assert warm == resume == cold


def test_a_process_that_fails_fails_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.json"
    monkeypatch.setattr(startup, "TRAIN", "/nowhere.py")
    monkeypatch.setattr(startup, "packed", lambda *_: tmp_path)
    assert startup.main(["--smoke", "--out", str(out)]) == 1
    why = json.loads(out.read_text())["failed"]["a process"]
    assert "exit code 2" in why and "nowhere" in why


def test_steps_of_a_start_are_limited_by_the_one_that_is_not_compiled() -> None:
    rows = startup.rows({"--help": [0.4], "plain": [4.0, 2.0, 3.0], "cold": [9.0], "warm": [6.0]})
    assert [row.limit for row in rows] == [None, None, 3.0, 3.0]
    assert [row.found.median for row in rows] == [0.4, 3.0, 9.0, 6.0]
    assert [row.target for row in rows] == [0.5, None, None, None]
