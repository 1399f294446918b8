"""The benchmark of the step compares like with like and reports right; no time is looked at."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast import losses
from mpl_fast.algorithms.base import train_step
from mpl_fast.config import MPLConfig, UDAConfig
from tools import bench_step
from tools.bench_steps import contestants, correctness, measure
from tools.bench_steps.contestants import Contestant, Flavor
from tools.bench_steps.measure import Found
from tools.bench_steps.passes import forward_count
from tools.bench_steps.phases import REST, phases
from tools.bench_steps.plain import PlainStep
from tools.bench_steps.rows import Scene, rows
from tools.bench_steps.setting import RECIPES, STEPS, Setting, batch, network, with_norm_batches

CPU = torch.device("cpu")
TINY = Setting("wrn_10_1", 3, 2, 8, CPU)
PLAIN_PHASES = {
    "teacher forward and losses",
    "student forward and loss",
    "student backward and update",
    "average of weights",
    "judging",
    "feedback's loss",
    "teacher backward and update",
    "numbers read by the host",
    REST,
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a smoke test of those that compile nothing."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    only = ["plain", "fp32 eager"]
    assert bench_step.main(["--smoke", "--device", "cpu", "--out", str(out), "--only", *only]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.slow
def test_smoke_times_everybody_and_claims_nothing(smoke: dict[str, Any]) -> None:
    found = {row["name"]: row for row in smoke["rows"]}
    assert smoke["claim"].startswith("a smoke test")
    for name in ("plain fp32", "plain amp", "ours fp32 eager joint", "one pass fp32 eager"):
        assert found[f"mpl, {name}: step"]["median"] > 0.0
    assert "mpl, plain fp32 / ours fp32 eager joint" in found
    assert "mpl, ours fp32 eager joint: step / its 46 passes" in found  # 2 (5 + 9 * 2)
    assert not any(row["steady"] or row["target"] is not None for row in smoke["rows"])
    phase = "mpl, plain fp32, phase: "
    assert {n.removeprefix(phase) for n in found if n.startswith(phase)} == PLAIN_PHASES
    assert smoke["skipped"] == []
    assert smoke["best of ours"] == {"mpl": "ours fp32 eager joint"}


@pytest.mark.slow
def test_ours_and_the_plain_step_are_the_same_step(smoke: dict[str, Any]) -> None:
    (checked,) = smoke["correctness"]
    assert not checked["wrong"]
    assert checked["error"] < 1e-9  # float64; what is allowed is 1e-6


def test_another_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinder(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        out = losses.smoothed_ce(logits, labels, label_smoothing=label_smoothing * 1.001)
        return out.loss

    monkeypatch.setattr("tools.bench_steps.plain._smoothed", kinder)
    assert correctness.parity(TINY)["wrong"]


def test_the_plain_step_reads_six_numbers_and_moves_everything() -> None:
    config = RECIPES["mpl"]
    assert isinstance(config, MPLConfig)
    nets = [network(TINY, seed) for seed in (0, 1)]
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    plain = PlainStep(nets[0], nets[1], config, steps=STEPS, device=CPU)
    average = [p.clone() for p in plain.average.parameters()]
    told = plain.step(batch(TINY, "mpl"))
    assert len(told) == 7  # and the step's number
    assert all(isinstance(value, float) for value in told.values())
    for net, old in zip(nets, before, strict=True):
        assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), old, strict=True))
    decay = config.student.ema
    student = plain.student.parameters()
    for kept, new, first in zip(plain.average.parameters(), student, average, strict=True):
        torch.testing.assert_close(kept, decay * first + (1 - decay) * new.detach())


@pytest.mark.parametrize(
    ("recipe", "kind", "passes"),
    [
        # In units of the labeled images: those of the design, and two judging passes.
        ("mpl", "joint", 5 + 9 * 7),
        ("mpl", "split", 5 + 7 * 7),
        # A labeled pass with its gradient, and the unlabeled ones with a derivative.
        ("mpl_exact", "joint", 3 * 15 + 3 * 7 + 3 + 3 * 7),
        ("uda", "joint", 3 * 15),
        ("uda", "split", 3 * 8 + 7),
        ("supervised", "joint", 3 * 8),  # as many labeled images as others have in all
        ("smpl", "joint", 7 + 2 + 3 * 7 + 3 * 15),
        # Labeled gradient, labels, two passes for the central difference; then mixed and weak ones.
        ("metasemi", "joint", 3 + 7 + 2 * 7 + 3 * 7 + 3 * 7),
    ],
)
def test_passes_are_those_of_a_real_step(recipe: str, kind: Any, passes: float) -> None:
    config = with_norm_batches(RECIPES[recipe], kind)
    assert config is not None
    assert forward_count(recipe, config, 4, 7) == 4 * passes


def test_the_images_lie_as_a_loader_gives_them() -> None:
    made = batch(TINY, "mpl", torch.bfloat16)
    assert made.labeled.shape == (3, 3, 8, 8)
    assert made.weak.shape == made.strong.shape == (6, 3, 8, 8)
    assert made.weak.dtype == torch.bfloat16
    assert made.strong.is_contiguous(memory_format=torch.channels_last)
    one_piece = {view.untyped_storage().data_ptr() for view in (made.labeled, made.weak)}
    assert len(one_piece) == 1
    assert len(batch(TINY, "supervised").labels) == TINY.distinct == 9


def test_phases_add_up_and_name_the_learner() -> None:
    one = contestants.ours(TINY, "mpl", Flavor())
    assert one is not None
    one.step()
    began = time.perf_counter()
    parts = phases(one.step, one.owners)
    whole = time.perf_counter() - began
    assert {"teacher forward", "student judging", "student forward", "ends", REST} <= set(parts)
    assert any(name.startswith("teacher backward") for name in parts)
    assert all(seconds >= 0.0 for seconds in parts.values())
    assert 0.0 < sum(parts.values()) <= whole
    assert type(next(iter(one.owners.values()))).__call__.__name__ == "__call__"  # unwrapped again


def test_a_method_that_calls_another_counts_once() -> None:
    class Owner:
        def descend(self) -> None:
            time.sleep(0.01)
            self.update()

        def update(self) -> None:
            time.sleep(0.02)

    owner = Owner()
    parts = phases(lambda: owner.descend(), {"x": owner})
    assert set(parts) == {"x backward and update", REST}
    assert parts["x backward and update"] >= 0.03


def test_a_wrong_compiled_network_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: the flavor says compiled, and the learner judges something else."""
    flavor = Flavor(False, "default", "joint")
    algorithm = contestants.algorithm_of(TINY, RECIPES["mpl"], Flavor())
    one = Contestant(flavor.name, dict, algorithm.learners, flavor)
    images = batch(TINY, "mpl")
    train_step(algorithm, images, 0)
    assert [row["wrong"] for row in correctness.logits(one, images.labeled)] == [False, False]
    learner = algorithm.learners["teacher"]
    judge = learner.forward_batch_stats
    monkeypatch.setattr(learner, "forward_batch_stats", lambda x: judge(x) * 1.01)
    assert [row["wrong"] for row in correctness.logits(one, images.labeled)] == [True, False]


def test_losses_are_compared_with_those_of_their_like() -> None:
    eager, compiled = Flavor(), Flavor(compiled="default")
    half, split = Flavor(True, "default"), Flavor(norm_batches="split")
    told = {
        eager: {"loss/student": 2.0, "loss/labeled": 1.0, "loss/feedback": 0.1, "h": 0.1},
        compiled: {"loss/student": 2.0, "loss/labeled": 1.0005, "loss/feedback": -0.1, "h": -0.1},
        half: {"loss/student": 3.0, "loss/labeled": 1.0},
        split: {"loss/student": 3.0, "loss/labeled": 1.0},
        half._replace(graphs="step"): {"loss/student": 3.6, "loss/labeled": 1.0},
    }
    first, second = correctness.same_losses(told, CPU)
    assert first["what"].endswith("ours fp32 compiled joint and of ours fp32 eager joint")
    assert first["error"] == pytest.approx(2.5e-4, rel=1e-3) and not first["wrong"]
    assert "bf16 compiled step-graph joint" in second["what"]
    assert second["error"] == pytest.approx(0.2) and second["wrong"]


def found(**seconds: list[float]) -> Found:
    names = {name.replace("_", " "): times for name, times in seconds.items()}
    return Found(names, {}, {}, [], [])


def by_name(made: Any) -> dict[str, Any]:
    return {row.name: row for row in made}


def test_ratios_and_targets_on_a_cpu() -> None:
    times = found(
        plain_fp32=[3.0, 6.0],
        ours_bf16_compiled_joint=[1.5, 2.0],
        ours_bf16_compiled_split=[1.0, 1.0],
        ours_fp32_compiled_split=[2.0, 3.0],
        one_pass_bf16_compiled=[0.3, 0.4],
    )
    setting = Setting("wrn_28_2", 8, 7, 32, CPU)
    made = by_name(rows(times, Scene(setting, "mpl", 8 * 68.0, "", False)))
    best = made["mpl, plain fp32 / best of ours"]
    assert best.found[:3] == (4.5, 3.0, 6.0)  # round by round
    assert (best.target, best.steady, best.better) == (2.5, True, "higher")
    equal = made["mpl, plain fp32 / best of ours in fp32"]
    assert (equal.found.median, equal.target) == (1.75, 1.3)
    split = made["mpl, ours bf16 compiled joint / split"]
    assert (split.found.median, split.target) == (1.75, None)
    # 64 images took 0.3 s with three passes each; the step makes 544.
    share = made["mpl, ours bf16 compiled joint: step / its 544 passes"]
    expected = [1.5 / (544 * 0.3 / 192), 2.0 / (544 * 0.4 / 192)]
    assert [share.found.high, share.found.low] == pytest.approx(sorted(expected, reverse=True))
    assert made["mpl, plain fp32: distinct images"].found.high == pytest.approx(64 / 3.0)
    other = by_name(rows(times, Scene(setting._replace(model="resnet50"), "mpl", 1.0, "", False)))
    assert all(row.target is None for row in other.values())


def test_targets_on_an_h100() -> None:
    times = found(plain_fp32=[0.2], plain_amp=[0.1], ours_bf16_compiled_split=[0.014])
    gpu = "NVIDIA H100 80GB HBM3"
    setting = Setting("wrn_28_2", 64, 7, 32, CPU)
    made = by_name(rows(times, Scene(setting, "mpl", 1.0, gpu, False)))
    assert made["mpl, plain amp / best of ours"].target == 4.0
    assert made["mpl, plain fp32 / best of ours"].target is None
    assert made["mpl, ours bf16 compiled split: step"].target == 15.0
    large = by_name(
        rows(times, Scene(Setting("resnet50", 32, 7, 224, CPU), "mpl", 1.0, gpu, False))
    )
    assert large["mpl, plain amp / best of ours"].target == 2.5
    assert large["mpl, ours bf16 compiled split: distinct images"].target == 1000.0
    assert large["mpl, ours bf16 compiled split: step"].target is None


def test_who_fails_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"plain fp32": 0, "plain amp": 0}

    def plain(setting: Setting, amp: bool) -> Contestant:
        name = "plain amp" if amp else "plain fp32"

        def step() -> dict[str, float]:
            steps[name] += 1
            if amp and steps[name] > 3:  # warm steps fit, those beside the others do not
                raise torch.OutOfMemoryError("CUDA out of memory")
            return {}

        return Contestant(name, step, {})

    def ours(setting: Setting, recipe: str, flavor: Flavor) -> Contestant:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(contestants, "plain", plain)
    monkeypatch.setattr(contestants, "ours", ours)
    told = measure.measure(
        TINY,
        "mpl",
        lambda name: "plain" in name or name == "ours fp32 eager joint",
        rounds=2,
        seed=0,
        seconds=60.0,
    )
    assert list(told.seconds) == ["plain fp32"]
    assert len(told.seconds["plain fp32"]) == 2
    assert told.skipped == [
        "failed: ours fp32 eager joint: RuntimeError: no compiler",
        "failed: plain amp: out of memory beside the others",
    ]


def test_without_time_the_first_one_is_measured_all_the_same() -> None:
    told = measure.measure(TINY, "mpl", lambda name: "plain" in name, rounds=3, seed=0, seconds=0.0)
    assert list(told.seconds) == ["plain amp"]
    assert len(told.seconds["plain amp"]) == 1
    assert told.skipped == ["no time: plain fp32", "no time: phases"]
    assert told.phases == {}


def test_a_recipe_without_the_choice_has_one_form() -> None:
    assert with_norm_batches(RECIPES["smpl"], "split") is None
    uda, split = RECIPES["uda"], with_norm_batches(RECIPES["uda"], "split")
    assert isinstance(uda, UDAConfig)
    assert split == dataclasses.replace(uda, bn_batches="split")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labeled", "0"], "--labeled"),
        (["--model", "wrn_28_3"], "wrn_28_3"),
        (["--smoke", "--only", "nobody"], "--only nobody"),
    ],
)
def test_one_line_for_a_wrong_option(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_step.main([*options, "--device", "cpu", "--out", str(tmp_path / "out.json")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not list(tmp_path.iterdir())
