"""The benchmark of optimizer tails: all the same step, what is counted, who is wrong; no time."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mpl_fast.learner import apex
from tools import bench_optim
from tools.bench.clock import Spread
from tools.bench.traffic import traffic
from tools.bench_tails import contestants, measure
from tools.bench_tails.contestants import HAND_OVER, PER_TENSOR, Tail
from tools.bench_tails.problem import CONFIG, NORM, Problem, furthest, problem, values

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> Problem:
    return problem("wrn_10_1", CPU, seed=0)


class Weights(NamedTuple):
    """Of the step by hand."""

    weight: torch.Tensor
    momentum: torch.Tensor
    average: torch.Tensor


def by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], scales: list[float]) -> Weights:
    """SGD in double precision, of one matrix that is decayed."""
    w = weight.detach().double()
    average, momentum = w.clone(), torch.zeros_like(w)
    for gradient, scale in zip(gradients, scales, strict=True):
        g = gradient.double() * scale + CONFIG.weight_decay * w
        momentum = CONFIG.momentum * momentum + g
        w = w - CONFIG.lr * (g + CONFIG.momentum * momentum)
        average = CONFIG.ema * average + (1 - CONFIG.ema) * w
    return Weights(w, momentum, average)


@pytest.mark.parametrize("name", ["per tensor", "foreach", "fused", "ours (Learner)"])
def test_a_tail_is_the_step_by_hand(name: str, small: Problem) -> None:
    tail = measure.stepped(small, contestants.contestants(CPU)[name])
    weight, gradient = next(small.network.parameters()), small.gradients[0]
    assert weight.ndim == 4
    steps = [gradient * factor for factor in measure.FACTORS]
    clipped = CONFIG.max_grad_norm / NORM  # where the norm is NORM; a tenth of that is not clipped
    right = by_hand(weight, steps, [clipped, 1.0, clipped])
    mine, average = next(tail.network.parameters()), next(tail.average.parameters())
    assert float((right.weight - weight.detach()).abs().max()) > 1e-4
    torch.testing.assert_close(mine.detach().double(), right.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(average.double(), right.average, rtol=0, atol=1e-7)


def test_norms_are_not_decayed_and_counters_are_copied(small: Problem) -> None:
    still = small._replace(gradients=[torch.zeros_like(g) for g in small.gradients])
    tail = contestants.per_tensor(still)
    for name, buffer in tail.network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    tail.work()
    pairs = zip(small.network.parameters(), tail.network.parameters(), strict=True)
    for before, after in pairs:
        assert torch.equal(before, after) == (before.ndim <= 1)
    tracked = [b for n, b in tail.average.named_buffers() if n.endswith("num_batches_tracked")]
    assert tracked
    assert all(int(b) == 7 for b in tracked)


def test_a_tail_leaves_no_gradients_and_hands_over_the_same(small: Problem) -> None:
    tail = contestants.hand_over(small)
    before = [v.clone() for v in values(tail.network)]
    tail.work()
    assert furthest(values(tail.network), before) == 0.0
    assert all(p.grad is None for p in tail.network.parameters())
    assert float(torch.stack([g.norm() for g in tail.gradients]).norm()) == pytest.approx(NORM)


def test_bytes_that_cannot_be_avoided(small: Problem) -> None:
    parameters = sum(p.numel() for p in small.network.parameters())
    channels = sum(p.numel() for n, p in small.network.named_buffers() if "running_mean" in n)
    assert small.minimal_bytes() == 4 * (8 * parameters + 3 * 2 * channels)
    found = {
        name: traffic(build(small).work) for name, build in contestants.contestants(CPU).items()
    }
    assert found[HAND_OVER] == (0, 0)
    least = small.minimal_bytes()
    assert least < found["fused"].bytes < found["foreach"].bytes <= found[PER_TENSOR].bytes
    assert found["fused"].bytes < 1.3 * least
    tensors = len(small.gradients)
    assert found[PER_TENSOR].calls > 5 * tensors
    assert found["fused"].calls < tensors


def slower(small: Problem) -> Tail:
    """Another learning rate."""
    tail = contestants.foreach(small)
    return tail._replace(work=lambda: [tail.work(), tail.work()])


def broken(small: Problem) -> Tail:
    raise RuntimeError("no such\nextension")


def nan(small: Problem) -> Tail:
    tail = contestants.foreach(small)
    with torch.no_grad():
        values(tail.average)[0].fill_(float("nan"))
    return tail


def test_who_is_wrong_is_told_and_left_out(small: Problem) -> None:
    builders = contestants.contestants(CPU)
    extra = {"twice": slower, "broken": broken, "nan": nan}
    tails, failed = measure.ready(small, {**builders, **extra})
    assert list(tails) == list(builders)
    assert "wrong: its weights are off by" in failed["twice"]
    assert failed["broken"] == "RuntimeError: no such"
    assert failed["nan"] == "wrong: its averages are off by nan"


def test_rows_of_known_times(small: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {HAND_OVER: 0.1, PER_TENSOR: 0.8, "foreach": 0.4, "fused": 0.2}

    def interleaved(works: dict[str, object], **options: object) -> dict[str, list[float]]:
        assert options == {"rounds": 3, "seed": 1, "seconds": 60.0}
        return {name: [seconds.get(name, 0.2)] * 3 for name in works}

    monkeypatch.setattr(measure, "interleaved", interleaved)
    speed = small.minimal_bytes() / 0.05  # bytes a second: the limit is 50 ms
    found = measure.measure(small, steps=2, rounds=3, seed=1, bytes_per_second=speed, seconds=60.0)
    assert found.failed == {}
    rows = {row.name: row for row in found.rows}
    assert rows["wrn_10_1: fused"].found == Spread(100.0, 100.0, 100.0, 3)
    assert rows["wrn_10_1: fused"].limit == pytest.approx(50.0)
    assert rows["wrn_10_1: fused / per tensor"].found.median == pytest.approx(4.0)
    assert rows["wrn_10_1: fused, operators"].steady
    assert rows["wrn_10_1: fused, memory"].limit == small.minimal_bytes() / 1e6
    assert rows[f"wrn_10_1: {HAND_OVER}"].limit is None
    assert f"wrn_10_1: {PER_TENSOR} / {PER_TENSOR}" not in rows


def test_apex_only_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for state, there in (("absent", False), ("another_package", False), ("usable", True)):
        monkeypatch.setattr(apex, "find", lambda state=state: state)
        assert ("apex FusedSGD" in contestants.contestants(gpu)) == there
        assert "apex FusedSGD" not in contestants.contestants(CPU)


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench_optim.main(["--smoke", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["failed"] == {}
    assert found["limits"]["copy, bytes/s"]["high"] > 0
    names = [row["name"] for row in found["rows"]]
    assert len(names) == 1 + 3 + 3 * 4  # times and counts; three are compared with the first
    assert "| wrn_10_1: ours (Learner) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--models", "wrn_10_1", "magic"], "'magic'"),
        (["--models", "wrn_10_1", "--steps", "0"], "--steps 0"),
        (["--models", "wrn_10_1", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench_optim.main(["--out", str(tmp_path / "out.json"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_optim: ")
    assert word in line
