"""The benchmark of the optimizer step: all do the same step, what is counted, what is wrong."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from tools.bench import optimizer
from tools.bench.harness import Report
from tools.bench.optimizer import (
    CONFIG,
    FOREACH,
    FUSED,
    NORM,
    OURS,
    PER_TENSOR,
    VARIANTS,
    Problem,
    Variant,
    build,
    floats,
    problem,
)
from tools.bench.results import Spread


@pytest.fixture(scope="module")
def small() -> Problem:
    return problem("wrn_10_1", torch.device("cpu"), seed=0)


def by_hand(
    weight: torch.Tensor, gradients: list[torch.Tensor], scales: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and average after SGD in double precision, of one matrix that is decayed."""
    w = weight.detach().double()
    average, momentum = w.clone(), torch.zeros_like(w)
    for gradient, scale in zip(gradients, scales, strict=True):
        g = gradient.double() * scale + CONFIG.weight_decay * w
        momentum = CONFIG.momentum * momentum + g
        w = w - CONFIG.lr * (g + CONFIG.momentum * momentum)
        average = CONFIG.ema * average + (1 - CONFIG.ema) * w
    return w, average


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_step_by_hand(name: str, small: Problem) -> None:
    mine = optimizer.stepped(small, name)
    weight, gradient = next(small.network.parameters()), small.gradients[0]
    assert weight.ndim == 4
    steps = [gradient * factor for factor in optimizer.FACTORS]
    clipped = CONFIG.max_grad_norm / NORM  # where the norm is NORM; a tenth of it is not clipped
    right, right_average = by_hand(weight, steps, [clipped, 1.0, clipped])
    moved, average = next(mine.network.parameters()), next(mine.average.parameters())
    assert float((right - weight.detach()).abs().max()) > 1e-4
    torch.testing.assert_close(moved.detach().double(), right, rtol=0, atol=1e-7)
    torch.testing.assert_close(average.double(), right_average, rtol=0, atol=1e-7)
    assert all(p.grad is None for p in mine.network.parameters())


@pytest.mark.parametrize("name", [PER_TENSOR, FOREACH])
def test_norms_are_not_decayed_and_counters_are_copied(name: str, small: Problem) -> None:
    still = small._replace(gradients=[torch.zeros_like(g) for g in small.gradients])
    variant = build(still, name)
    for counter in optimizer.counters(variant.network):
        counter.fill_(7)
    variant.work()
    pairs = zip(small.network.parameters(), variant.network.parameters(), strict=True)
    for before, after in pairs:
        assert torch.equal(before, after) == (before.ndim <= 1)
    counters = optimizer.counters(variant.average)
    assert counters
    assert all(int(b) == 7 for b in counters)


def test_rows_of_known_times(small: Problem) -> None:
    works = {name: build(small, name).work for name in VARIANTS}
    seconds = dict(zip(VARIANTS, ([0.4] * 3, [0.2] * 3, [0.1] * 3, [0.1] * 3), strict=True))
    rows = {row.name: row for row in optimizer.rows(small, works, seconds, limit=0.05)}
    assert rows["wrn_10_1: fused"].found == Spread(100.0, 100.0, 100.0, 3)
    assert rows["wrn_10_1: fused"].limit == pytest.approx(50.0)
    assert rows["wrn_10_1: fused / per tensor"].found.median == pytest.approx(4.0)
    assert rows["wrn_10_1: fused, operators"].steady
    assert f"wrn_10_1: {PER_TENSOR} / {PER_TENSOR}" not in rows
    # What cannot be avoided, and what each of them makes of it.
    parameters = sum(p.numel() for p in small.network.parameters())
    channels = sum(p.numel() for n, p in small.network.named_buffers() if "running_mean" in n)
    least = 4 * (8 * parameters + 3 * 2 * channels)
    assert small.minimal_bytes() == least
    assert rows["wrn_10_1: fused, memory"].limit == least / 1e6
    memory = [1e6 * rows[f"wrn_10_1: {name}, memory"].found.median for name in VARIANTS]
    assert least < memory[2] < memory[1] <= memory[0] and memory[2] < 1.3 * least
    calls = [rows[f"wrn_10_1: {name}, operators"].found.median for name in VARIANTS]
    assert calls[0] > 5 * len(small.gradients) > 5 * calls[2]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("twice", "its network is wrong: "),
        ("raises", "RuntimeError: no such extension"),
        ("nan", "its average is wrong: "),
    ],
)
def test_what_is_wrong_is_reported_and_not_timed(
    fault: str, words: str, small: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_one(problem: Problem, name: str) -> Variant:
        variant = build(problem, name)
        if name != OURS:
            return variant
        if fault == "raises":
            raise RuntimeError("no such\nextension")
        if fault == "nan":
            floats(variant.average)[0].fill_(float("nan"))
            return variant
        return variant._replace(work=lambda: [variant.work(), variant.work()])

    monkeypatch.setattr(optimizer, "build", build_one)
    report = Report("x", argparse.Namespace(minutes=None, out=tmp_path / "out.json"))
    assert list(optimizer.correct(small, report)) == [PER_TENSOR, FOREACH, FUSED]
    ((name, why),) = report.failed.items()
    assert name == f"wrn_10_1: {OURS}" and words in why


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert optimizer.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 3 + 3 * 4  # times and counts; three are compared with the first
    assert rows["wrn_10_1: ours (Learner)"]["n"] == 2
    assert 0 < rows["wrn_10_1: fused, memory"]["share_of_limit"] <= 1
    assert optimizer.main(["--models", "wrn_28_3", "--device", "cpu", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wrn_28_3" in error
