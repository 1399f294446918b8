"""The two-moons study: one run of many is that run alone, the statistics are right, and its files
and errors are as documented."""

import json
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpl_fast.algorithms import AlgorithmContext, build
from mpl_fast.algorithms.base import train_step
from mpl_fast.algorithms.labels import Labels
from mpl_fast.batch import Batch
from mpl_fast.config import RECIPES, ConsistencyConfig, LearnerConfig
from mpl_fast.learner import Learner, rng
from tests.tiny_run import run_here
from tools.studies.command import Content, write
from tools.studies.two_moons.__main__ import main
from tools.studies.two_moons.algorithm import RATE, RunDifference, algorithm
from tools.studies.two_moons.data import BATCH, Options, Problem, problem, stacked
from tools.studies.two_moons.networks import Weights
from tools.studies.two_moons.report import as_json, as_markdown
from tools.studies.two_moons.training import (
    evaluate,
    spread,
    study,
    train,
)
from tools.studies.two_moons.variants import VARIANTS, Variant, with_baselines

OPTIONS = Options(draws=2, inits=2, steps=20)
RUN = 2  # the one that is repeated alone: first weights of the second label draw
DIFFERENCE = "{mean:+.2f} ± {se_runs:.2f} ± {se_draws:.2f}"


@pytest.fixture(scope="module")
def moons() -> Problem:
    return problem("3/3", OPTIONS)


class OneRun(nn.Module):
    """One run's network of torch's own layers."""

    def __init__(self, start: Weights) -> None:
        super().__init__()
        layers = [nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)]
        self.layers = nn.Sequential(*layers).double()
        with torch.no_grad():
            for weight, given in zip(self.parameters(), start, strict=True):
                weight.copy_(given[RUN].reshape(weight.shape))

    def forward(self, points: Tensor) -> Tensor:
        z = self.layers(points)
        return torch.cat([torch.zeros_like(z), z], -1)


def train_alone(variant: Variant, moons: Problem) -> list[Tensor]:
    """Weights of the project's algorithm itself on one run. (It is compared with its definition in
    tests/algorithms.)"""
    plain = LearnerConfig(
        lr=RATE,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        max_grad_norm=0.0,
        warmup=0,
        schedule="constant",
    )
    shared: dict[str, Any] = {"label_smoothing": 0.0}
    if variant.recipe != "supervised":
        shared |= {"consistency": ConsistencyConfig(weight=0.0), "derivative": "forward"}
    two = variant.recipe == "mpl"
    learners = {"teacher": plain, "student": plain} if two else {"learner": plain}
    kind: Any = RECIPES[variant.recipe]
    config = kind(**learners, **shared, **variant.options)
    starts = iter([moons.teacher, moons.student])
    made = build(
        config, lambda c: Learner(OneRun(next(starts)), c, steps=1), AlgorithmContext(seed=0)
    )
    for t in range(OPTIONS.steps):
        rows = moons.batches[t, RUN]
        points, truth = moons.points[rows], moons.truth[rows]
        labeled, labels = moons.labeled[RUN], moons.labels[RUN]
        if variant.all_labels:
            labeled, labels = points, truth
        train_step(made, Batch(labeled, labels, points, points, truth), t)
    return [torch.cat([w.flatten() for w in x.weights()]) for x in made.learners.values()]


def one_run(weights: Weights) -> Tensor:
    return torch.cat([w[RUN].flatten() for w in weights])


def teacher_of(name: str, moons: Problem) -> Tensor:
    return one_run(train(VARIANTS[name], moons, OPTIONS.steps, 0)["teacher"])


@pytest.mark.parametrize("name", VARIANTS)
def test_one_run_of_many_is_the_run_alone(
    name: str, moons: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = VARIANTS[name]
    found = list(train(variant, moons, OPTIONS.steps, 0).values())
    many = rng.uniform

    def of_run(count: int, **place: Any) -> Tensor:
        return many(count * OPTIONS.runs, **place).view(count, -1)[:, RUN]

    monkeypatch.setattr(rng, "uniform", of_run)
    expected = train_alone(variant, moons)
    assert len(found) == len(expected)
    for mine, other, before in zip(found, expected, [moons.teacher, moons.student], strict=False):
        torch.testing.assert_close(one_run(mine), other, rtol=0, atol=1e-10)
        assert float((one_run(mine) - one_run(before)).abs().max()) > 1e-3


@pytest.mark.slow
def test_feedback_is_large_enough_for_that_comparison(moons: Problem) -> None:
    """Else the loops could agree without it."""
    off = teacher_of("mpl_off", moons)
    labeled = one_run(train(VARIANTS["labeled"], moons, OPTIONS.steps, 0)["learner"])
    for name in ("mpl_off_soft", "mpl_off_sampled"):
        torch.testing.assert_close(teacher_of(name, moons), off, rtol=0, atol=1e-14)
    torch.testing.assert_close(labeled, off, rtol=0, atol=1e-13)
    for name in ("mpl_exact", "mpl_difference", "mpl_kekmodel", "mpl_sampled", "mpl_per_example"):
        assert float((teacher_of(name, moons) - off).abs().max()) > 1e-6


def test_difference_is_zero_for_a_student_that_does_not_move(moons: Problem) -> None:
    student = algorithm(VARIANTS["mpl_difference"], moons, 0).learners["student"]
    batch = moons.batch(0)
    feedback = RunDifference(student, batch.labeled, batch.labels)
    labels = Labels(batch.truth, None, batch.truth)
    feedback.observe_update(batch.strong, labels, torch.zeros(()))
    assert torch.equal(feedback._h, torch.zeros(OPTIONS.runs, dtype=torch.float64))


def test_own_soft_labels_without_augmentation_do_not_move_a_network(moons: Problem) -> None:
    """SMPL with soft labels and a feedback of weight 0 is training on labels only."""
    still = Variant("", "smpl", {"feedback": "exact", "feedback_weight": 0.0})
    found = train(still, moons, OPTIONS.steps, 0)["learner"]
    labeled = train(VARIANTS["labeled"], moons, OPTIONS.steps, 0)["learner"]
    torch.testing.assert_close(one_run(found), one_run(labeled), rtol=0, atol=1e-13)


# --- the data ---


@pytest.mark.parametrize("places", ["spread", "random"])
def test_labels_are_as_many_as_the_setting_says(places: str) -> None:
    options = Options(draws=3, inits=2, steps=4, labels=places)  # type: ignore[arg-type]
    data = problem("5/1", options)
    assert data.labels.tolist() == [[0, 0, 0, 0, 0, 1]] * 6
    assert torch.equal(data.labeled[0], data.labeled[1])  # two initial weights of a draw
    assert not torch.equal(data.labeled[1], data.labeled[2])
    known = [{tuple(p) for p in run.tolist()} for run in data.labeled]
    for run in range(6):
        seen = data.points[data.batches[:, run].flatten()]
        assert not known[run] & {tuple(p) for p in seen.tolist()}
    assert data.points.shape == ({"spread": 1994, "random": 2000}[places], 2)
    # The last two, which may be held out, are one of each class.
    assert problem("3/3", options).labels.tolist() == [[0, 0, 1, 1, 0, 1]] * 6


def test_settings_differ_only_in_labels(moons: Problem) -> None:
    other = problem("5/1", OPTIONS)
    both = stacked([moons, other])
    assert torch.equal(moons.points, other.points) and torch.equal(moons.batches, other.batches)
    assert torch.equal(both.teacher[0][:4], both.teacher[0][4:])
    assert torch.equal(both.labels[4:], other.labels) and both.batches.shape == (20, 8, BATCH)
    batch = both.batch(3)  # rows by example, then by run
    assert torch.equal(batch.weak[5 * 8 + 6], both.points[both.batches[3, 6, 5]])
    assert torch.equal(batch.labeled[2 * 8 + 7], both.labeled[7, 2])


# --- the numbers ---


def test_paired_spread_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).numpy()
    found = spread(values)
    assert found.mean == 4.0 and found.sd == pytest.approx((20 / 3) ** 0.5)
    assert found.se_runs == pytest.approx((20 / 3) ** 0.5 / 2)
    assert found.se_draws == pytest.approx(2.0)  # draw means 2 and 6: sd 8 ** 0.5, over 2 ** 0.5


def test_both_settings_at_once_are_each_alone(moons: Problem) -> None:
    other, variant = problem("5/1", OPTIONS), VARIANTS["mpl_difference"]
    found = evaluate(variant, {"3/3": moons, "5/1": other}, OPTIONS)
    alone = train(variant, other, OPTIONS.steps, 0)["student"]
    for mine, expected in zip(found["5/1"].weights, alone, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


def test_the_same_seed_gives_the_same_numbers() -> None:
    def numbers(seed: int) -> str:
        options = Options(draws=2, inits=2, steps=10, seed=seed)
        names = with_baselines(["mpl_sampled"])
        assert names == ["labeled", "mpl_off_sampled", "mpl_sampled"]
        return as_json(study(names, options), options)

    first = numbers(0)
    assert numbers(0) == first
    runs = [json.loads(t)["results"]["3/3"]["labeled"]["runs"] for t in (first, numbers(1))]
    assert runs[0] != runs[1]


@pytest.mark.parametrize(("steps", "there"), [(100, False), (101, True)])
def test_a_row_that_stops_early_is_left_out_of_a_run_as_short(steps: int, there: bool) -> None:
    options = Options(draws=2, inits=1, steps=steps)
    found = study(with_baselines(["labeled_100"]), options)
    numbers = json.loads(as_json(found, options))["results"]
    names = ["labeled", "labeled_100"] if there else ["labeled"]
    assert [list(numbers[setting]) for setting in ("3/3", "5/1")] == [names, names]
    table = as_markdown(found, options)
    assert table.count("| labeled only, 100 steps |") == 2 * there
    # In its own row, and as what the other is compared with.
    assert table.count("| labeled only |") == 2 + 2 * there


# --- the command ---


@pytest.mark.slow
def test_command_writes_numbers_table_and_figure(tmp_path: Path) -> None:
    sizes = ["--draws", "2", "--inits", "2", "--steps", "20", "--seed", "3"]
    out = tmp_path / "new" / "out"
    done = run_here(lambda: main(["--out", str(out), *sizes]), [])
    assert done.returncode == 0 and done.stderr == ""
    names = ["two_moons.json", "two_moons.md", "two_moons.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert (out / "two_moons.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((out / "two_moons.json").read_text())
    assert numbers["settings"]["seed"] == 3 and numbers["versions"]["torch"] == version("torch")
    table = (out / "two_moons.md").read_text()
    assert f"{len(VARIANTS)}/{len(VARIANTS)}" in done.stdout
    for setting in ("3/3", "5/1"):
        rows = numbers["results"][setting]
        here = [n for n, c in VARIANTS.items() if setting in c.settings]
        assert list(rows) == [n for n in here if n != "labeled_100"]  # 20 steps are all it has
        section = table.split(f"### {setting} labels")[1].split("###")[0]
        for row in rows.values():
            (line,) = [text for text in section.splitlines() if f"| {row['title']} |" in text[:60]]
            for key, form in (("accuracy", "{mean:.1f} ± {sd:.1f}"), ("difference", DIFFERENCE)):
                assert row[key] is None or form.format(**row[key]) in line
            every = torch.tensor(row["runs"])
            assert every.shape == (2, 2)
            assert float(every.mean()) == pytest.approx(row["accuracy"]["mean"], abs=0.01)
            assert (row["difference"] is None) == (row["baseline"] is None)
            if row["baseline"]:
                paired = float((every - torch.tensor(rows[row["baseline"]]["runs"])).mean())
                assert row["difference"]["mean"] == pytest.approx(paired, abs=0.02)
        assert rows["mpl_off"]["teacher_difference"]["mean"] == 0.0  # trained like `labeled`


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--draws", "1"], 2, "--draws: must be a whole number of at least 2, not '1'"),
        (["--steps", "many"], 2, "--steps: must be a whole number of at least 1, not 'many'"),
        (["--variants", "mpl_exat"], 2, "'mpl_exat' does not exist; did you mean mpl_exact?"),
        (["--labels", "odd"], 2, "--labels: invalid choice: 'odd'"),
        (["--wrong"], 2, "unrecognized arguments: --wrong"),
        (["--out", "FILE"], 3, "is a file; name a folder"),
        (["--out", "FILE/below"], 3, "Not a directory"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], code: int, message: str, tmp_path: Path) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_text("mine")
    line = ["--out", str(out), *(o.replace("FILE", str(file)) for o in options)]
    done = run_here(lambda: main(line), [])
    assert done.returncode == code and done.stderr.count("\n") == 1
    assert done.stderr.startswith("two_moons: error: ") and message in done.stderr
    assert not out.exists() and file.read_text() == "mine"


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(root: Path, tmp_path: Path) -> None:
    sizes = ["--draws", "2", "--inits", "1", "--steps", "1000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.studies.two_moons", *sizes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        start_new_session=True,
    )
    assert process.stdout is not None and " 1/" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, problems = process.communicate(timeout=600)
    assert process.returncode == 130
    assert problems.splitlines()[-1] == "two_moons: interrupted; nothing was written"
    assert "Traceback" not in problems and list(tmp_path.iterdir()) == []


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    old = tmp_path / "two_moons.json"
    old.write_text("of before")

    def broken(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    contents: dict[str, Content] = {"two_moons.json": "new", "two_moons.md": broken}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, contents)
    assert [p.name for p in tmp_path.iterdir()] == ["two_moons.json"]
    assert old.read_text() == "of before"
    contents["two_moons.md"] = "new"
    assert [p.name for p in write(tmp_path, contents)] == ["two_moons.json", "two_moons.md"]
    assert old.read_text() == "new" and len(list(tmp_path.iterdir())) == 2
