"""The benchmark of the optimizer step: all do the same step, what is counted, what is wrong."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import optimizer
from tools.bench.count import operators
from tools.bench.harness import Report
from tools.bench.optimizer import (
    BUILDERS,
    CONFIG,
    NORM,
    OURS,
    PER_TENSOR,
    Problem,
    Variant,
    floats,
    problem,
    stepped,
)
from tools.bench.results import Spread

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> Problem:
    return problem("wrn_10_1", CPU, seed=0)


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


@pytest.mark.parametrize("name", [PER_TENSOR, "foreach", "fused", OURS])
def test_a_variant_is_the_step_by_hand(name: str, small: Problem) -> None:
    mine = stepped(small, BUILDERS[name])
    weight, gradient = next(small.network.parameters()), small.gradients[0]
    assert weight.ndim == 4
    steps = [gradient * factor for factor in optimizer.FACTORS]
    clipped = CONFIG.max_grad_norm / NORM  # where the norm is NORM; a tenth of it is not clipped
    right, right_average = by_hand(weight, steps, [clipped, 1.0, clipped])
    moved, average = next(mine.network.parameters()), next(mine.average.parameters())
    assert float((right - weight.detach()).abs().max()) > 1e-4
    torch.testing.assert_close(moved.detach().double(), right, rtol=0, atol=1e-7)
    torch.testing.assert_close(average.double(), right_average, rtol=0, atol=1e-7)


def test_norms_are_not_decayed_and_counters_are_copied(small: Problem) -> None:
    still = small._replace(gradients=[torch.zeros_like(g) for g in small.gradients])
    variant = optimizer.per_tensor(still)
    for name, buffer in variant.network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    variant.work()
    pairs = zip(small.network.parameters(), variant.network.parameters(), strict=True)
    for before, after in pairs:
        assert torch.equal(before, after) == (before.ndim <= 1)
    counters = optimizer.counters(variant.average)
    assert counters
    assert all(int(b) == 7 for b in counters)


def test_a_variant_leaves_no_gradients_and_sets_the_same_again(small: Problem) -> None:
    norms: list[float] = []

    def work() -> None:
        found = torch.stack(
            [p.grad.norm() for p in small.network.parameters() if p.grad is not None]
        )
        norms.append(float(found.norm()))

    variant = optimizer._variant(small, small.network, small.network, work)
    for _ in range(2):
        variant.work()
    assert norms == pytest.approx([NORM, NORM])
    assert all(p.grad is None for p in small.network.parameters())


def test_bytes_that_cannot_be_avoided(small: Problem) -> None:
    parameters = sum(p.numel() for p in small.network.parameters())
    channels = sum(p.numel() for n, p in small.network.named_buffers() if "running_mean" in n)
    least = small.minimal_bytes()
    assert least == 4 * (8 * parameters + 3 * 2 * channels)
    found = {name: operators(build(small).work) for name, build in BUILDERS.items()}
    assert least < found["fused"].bytes < found["foreach"].bytes <= found[PER_TENSOR].bytes
    assert found["fused"].bytes < 1.3 * least
    tensors = len(small.gradients)
    assert found[PER_TENSOR].calls > 5 * tensors
    assert found["fused"].calls < tensors


def twice(small: Problem) -> Variant:
    variant = optimizer.foreach(small)
    return variant._replace(work=lambda: [variant.work(), variant.work()])


def broken(small: Problem) -> Variant:
    raise RuntimeError("no such\nextension")


def nan(small: Problem) -> Variant:
    variant = optimizer.foreach(small)
    floats(variant.average)[0].fill_(float("nan"))
    return variant


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (twice, "wrong: its network is off by"),
        (broken, "RuntimeError: no such extension"),
        (nan, "wrong: its average is off by nan"),
    ],
)
def test_what_is_wrong_is_reported_and_not_timed(
    build: optimizer.Builder, words: str, small: Problem, tmp_path: Path
) -> None:
    report = Report("x", argparse.Namespace(minutes=None, out=tmp_path / "out.json"))
    variants = optimizer.correct(small, {**BUILDERS, "wrong": build}, report)
    assert list(variants) == list(BUILDERS)
    (name, why), *others = report.failed.items()
    assert name == "wrn_10_1: wrong" and words in why and not others


def test_rows_of_known_times(small: Problem) -> None:
    variants = {name: build(small) for name, build in BUILDERS.items()}
    seconds = {PER_TENSOR: [0.4] * 3, "foreach": [0.2] * 3, "fused": [0.1] * 3}
    seconds[OURS] = [0.1] * 3
    rows = {row.name: row for row in optimizer.rows(small, variants, seconds, limit=0.05)}
    assert rows["wrn_10_1: fused"].found == Spread(100.0, 100.0, 100.0, 3)
    assert rows["wrn_10_1: fused"].limit == pytest.approx(50.0)
    assert rows["wrn_10_1: fused / per tensor"].found.median == pytest.approx(4.0)
    assert rows["wrn_10_1: fused, operators"].steady
    assert rows["wrn_10_1: fused, memory"].limit == small.minimal_bytes() / 1e6
    assert f"wrn_10_1: {PER_TENSOR} / {PER_TENSOR}" not in rows


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert optimizer.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 3 + 3 * 4  # times and counts; three are compared with the first
    assert rows["wrn_10_1: ours (Learner)"]["n"] == 2
    assert 0 < rows["wrn_10_1: fused, memory"]["share_of_limit"] <= 1
    assert found["limits"]["copy, bytes/s"]["n"] == 10
    assert optimizer.main(["--models", "wrn_28_3", "--device", "cpu", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wrn_28_3" in error
