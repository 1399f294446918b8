"""The benchmark of syncs and collectives: its counts, its budgets and its exit codes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tools.bench import step_variants, syncs
from tools.bench.count import host_syncs
from tools.bench.step_variants import Flavor, Setting

CPU = torch.device("cpu")
TINY = Setting("wrn_10_1", 2, 2, 8, CPU)


def test_the_plain_step_waits_six_times_and_ours_never() -> None:
    plain = step_variants.plain(TINY, amp=False)
    ours = step_variants.ours(TINY, "mpl", Flavor())
    assert ours is not None
    for one in (plain, ours):
        one.step()
    waits = host_syncs(plain.step, CPU)
    assert waits.total() == 6
    assert all("step_reference.py" in where for where in waits)
    assert not host_syncs(ours.step, CPU)


@pytest.mark.slow
def test_smoke_counts_recipes(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    recipes = ["mpl", "uda", "supervised"]
    code = syncs.main(["--smoke", "--device", "cpu", "--recipe", *recipes, "--out", str(out)])
    found = json.loads(out.read_text())
    numbers = {row["name"]: row["median"] for row in found["rows"]}
    assert numbers["plain mpl: host synchronizations"] == 6
    for recipe in recipes:
        assert numbers[f"{recipe}: host synchronizations"] == 0
        assert numbers[f"{recipe}: operator calls"] > 100
    assert numbers["mpl: operator calls"] < numbers["plain mpl: operator calls"]
    # One for each update, and one for the feedback.
    assert [numbers[f"{recipe}: collectives"] for recipe in recipes] == [3, 1, 1]
    # As many, and for the seven norms of both networks one forward and one backward.
    assert numbers["mpl norm sync: collectives"] == 3 + 2 * 2 * 7
    assert numbers["mpl norm sync: host synchronizations"] == 0
    assert code == 0
    assert all(row["steady"] for row in found["rows"])


def test_above_the_budget_is_exit_code_1_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plain step in the place of ours, and four collectives."""
    monkeypatch.setattr(
        step_variants, "ours", lambda setting, *_: step_variants.plain(setting, amp=False)
    )
    exchanged = {"mpl": Counter({"allreduce_": 4}), syncs.SYNC_NORM: Counter[str]()}
    monkeypatch.setattr(syncs, "on_ranks", lambda *given: exchanged)
    out = tmp_path / "out.json"
    given = ["--smoke", "--device", "cpu", "--recipe", "mpl", "--out", str(out)]
    assert syncs.main(given) == 1
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert "mpl: host synchronizations: above the budget of 0" in first
    assert "step_reference.py" in first
    assert "mpl: collectives: above the budget of 3: {'allreduce_': 4}" in second
    where = json.loads(out.read_text())["where"]
    assert sum(where["mpl: host synchronizations"].values()) == 6
