"""The two-moons study: stacked runs are what a plain loop computes, and the command is sound."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpl_fast.experiments.moons_contestants import CONTESTANTS, MPL, SMPL, Labeled
from mpl_fast.experiments.moons_data import BATCH, Options, Problem, problem, stacked
from mpl_fast.experiments.moons_nets import Net, cross_entropy, descend, gradient, leaf, log_probs
from mpl_fast.experiments.moons_report import as_json, as_markdown, write
from mpl_fast.experiments.moons_steps import (
    RATE,
    batch_at,
    feedback,
    label_weights,
    pseudo_labels,
)
from mpl_fast.experiments.moons_study import compete, gain, spread, study, train, with_baselines
from mpl_fast.experiments.two_moons import main

OPTIONS = Options(draws=2, inits=2, steps=20)
RUN = 2  # the one that the plain loop repeats: first weights of the second label draw
COMMAND = [sys.executable, "-m", "mpl_fast.experiments.two_moons"]


@pytest.fixture(scope="module")
def moons() -> Problem:
    return problem("3/3", OPTIONS)


# --- the plain loop: one run, torch's own layers, loss and optimizer ---


class Plain:
    """One run, written as the published notebooks write it: one logit and a logistic loss."""

    def __init__(self, moons: Problem) -> None:
        self.moons = moons
        self.points, self.labels = moons.labeled[RUN], moons.labels[RUN].double()

    def network(self, start: Net) -> tuple[nn.Sequential, torch.optim.SGD]:
        layers = [nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)]
        net = nn.Sequential(*layers).double()
        with torch.no_grad():
            for weight, given in zip(net.parameters(), start, strict=True):
                weight.copy_(given[RUN])
        return net, torch.optim.SGD(net.parameters(), lr=0.1)

    def labeled_loss(self, net: nn.Sequential) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(self.points)[:, 0], self.labels)

    def unlabeled(self, t: int) -> Tensor:
        return self.moons.points[self.moons.batches[t, RUN]]

    def pseudo(self, kind: str, z: Tensor, t: int) -> Tensor:
        p = torch.sigmoid(z.detach())
        if kind == "soft":
            return p
        return ((p > 0.5) if kind == "argmax" else (self.moons.uniforms[t, RUN] < p)).double()


def functional(net: nn.Sequential, weights: list[Tensor], points: Tensor) -> Tensor:
    names = [name for name, _ in net.named_parameters()]
    z: Tensor = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (points,))
    return z[:, 0]


def through_the_step(plain: Plain, student: nn.Sequential, z: Tensor, x: Tensor) -> Tensor:
    """The student's labeled loss after its step, with the graph back to the teacher's logits."""
    lesson = F.binary_cross_entropy_with_logits(student(x)[:, 0], torch.sigmoid(z))
    weights = list(student.parameters())
    slope = torch.autograd.grad(lesson, weights, create_graph=True)
    moved = [w - RATE * g for w, g in zip(weights, slope, strict=True)]
    return F.binary_cross_entropy_with_logits(
        functional(student, moved, plain.points), plain.labels
    )


def slopes_per_example(student: nn.Sequential, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    weights = list(student.parameters())
    losses = F.binary_cross_entropy_with_logits(student(x)[:, 0], y, reduction="none")
    return [list(torch.autograd.grad(one, weights, retain_graph=True)) for one in losses]


def plain_mpl(plain: Plain, recipe: MPL) -> list[nn.Sequential]:
    student, student_sgd = plain.network(plain.moons.student)
    teacher, teacher_sgd = plain.network(plain.moons.teacher)
    for t in range(OPTIONS.steps):
        x = plain.unlabeled(t)
        z = teacher(x)[:, 0]
        y = plain.pseudo(recipe.pseudo, z, t)
        term = torch.zeros((), dtype=torch.float64)
        if recipe.feedback == "exact":
            hindsight = through_the_step(plain, student, z, x)
            slope = torch.autograd.grad(hindsight, list(teacher.parameters()), retain_graph=True)
            parts = [(g * w).sum() for g, w in zip(slope, teacher.parameters(), strict=True)]
            term = torch.stack(parts).sum()
        each = slopes_per_example(student, x, y)
        old = plain.labeled_loss(student).detach()

        student_sgd.zero_grad()
        F.binary_cross_entropy_with_logits(student(x)[:, 0], y).backward()
        student_sgd.step()

        if recipe.feedback == "difference":
            h = old - plain.labeled_loss(student).detach()
            term = h * F.binary_cross_entropy_with_logits(z, y)
        if recipe.feedback == "per_example":
            v = torch.autograd.grad(plain.labeled_loss(student), list(student.parameters()))
            dots = [sum((a * b).sum() for a, b in zip(v, g, strict=True)) for g in each]
            h = torch.stack([torch.as_tensor(dot) for dot in dots]) * RATE / BATCH
            term = (h * F.binary_cross_entropy_with_logits(z, y, reduction="none")).sum()
        teacher_sgd.zero_grad()
        (plain.labeled_loss(teacher) + recipe.weight * term).backward()
        teacher_sgd.step()
    return [student, teacher]


def tangent(net: nn.Sequential, at: list[Tensor], along: list[Tensor], x: Tensor) -> Tensor:
    """How fast the logits grow along a direction in weight space."""
    change: Tensor = torch.func.jvp(
        lambda *w: functional(net, list(w), x), tuple(at), tuple(along)
    )[1]
    return change


def plain_smpl(plain: Plain, recipe: SMPL) -> list[nn.Sequential]:
    net, sgd = plain.network(plain.moons.teacher)
    for t in range(OPTIONS.steps):
        x = plain.unlabeled(t)
        before = [w.detach().clone() for w in net.parameters()]
        old = plain.labeled_loss(net).detach()
        z = net(x)[:, 0]
        sgd.zero_grad()
        F.binary_cross_entropy_with_logits(z, plain.pseudo(recipe.pseudo, z, t)).backward()
        sgd.step()

        loss = plain.labeled_loss(net)
        z = net(x)[:, 0]
        if recipe.feedback == "difference":
            h = old - loss.detach()
            loss = loss + h * F.binary_cross_entropy_with_logits(z, plain.pseudo("argmax", z, t))
        if recipe.feedback == "exact":
            v = torch.autograd.grad(plain.labeled_loss(net), list(net.parameters()))
            along = tangent(net, before, list(v), x)
            p = torch.sigmoid(functional(net, before, x)).detach()
            of_one, of_zero = along * (1 - p), -along * p  # d log sigmoid(z), d log sigmoid(-z)
            q = torch.sigmoid(z)
            loss = loss + RATE / BATCH * (of_one * q + of_zero * (1 - q)).sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return [net]


def plain_labeled(plain: Plain) -> list[nn.Sequential]:
    net, sgd = plain.network(plain.moons.teacher)
    for _ in range(OPTIONS.steps):
        sgd.zero_grad()
        plain.labeled_loss(net).backward()
        sgd.step()
    return [net]


def one_run(net: Net) -> Tensor:
    return torch.cat([w[RUN].flatten() for w in net])


def flat(net: nn.Module) -> Tensor:
    return torch.cat([w.detach().flatten() for w in net.parameters()])


PLAIN = [
    "labeled",
    "mpl_off",
    "mpl_difference",
    "mpl_kekmodel",
    "mpl_sampled",
    "mpl_per_example",
    "mpl_exact",
    "mpl_exact_x10",
    "smpl_off",
    "smpl_difference",
    "smpl_exact",
]


@pytest.mark.parametrize("name", PLAIN)
def test_a_stacked_run_is_the_plain_loop(name: str, moons: Problem) -> None:
    contestant, plain = CONTESTANTS[name], Plain(moons)
    match contestant.recipe:
        case MPL() as recipe:
            expected = plain_mpl(plain, recipe)
        case SMPL() as smpl:
            expected = plain_smpl(plain, smpl)
        case Labeled():
            expected = plain_labeled(plain)
    pair = train(contestant, moons, OPTIONS.steps)
    found = [pair.student, pair.teacher] if pair.teacher else [pair.student]
    start = [moons.student, moons.teacher] if pair.teacher else [moons.teacher]
    for mine, theirs, before in zip(found, expected, start, strict=True):
        torch.testing.assert_close(one_run(mine), flat(theirs), rtol=0, atol=1e-10)
        assert float((one_run(mine) - one_run(before)).abs().max()) > 1e-3


def test_feedback_is_large_enough_for_that_comparison(moons: Problem) -> None:
    """Else the loops could agree without it."""
    teachers = {}
    for name in ("mpl_off_soft", "mpl_exact", "mpl_off", "mpl_difference", "mpl_kekmodel"):
        teacher = train(CONTESTANTS[name], moons, OPTIONS.steps).teacher
        assert teacher is not None
        teachers[name] = one_run(teacher)
    assert torch.equal(teachers["mpl_off"], teachers["mpl_off_soft"])
    for name in ("mpl_exact", "mpl_difference", "mpl_kekmodel"):
        assert float((teachers[name] - teachers["mpl_off"]).abs().max()) > 1e-6


# --- the mathematics, for all runs at once ---


@pytest.mark.parametrize("held_out", [False, True])
def test_exact_is_autograd_through_the_step(held_out: bool, moons: Problem) -> None:
    batch = batch_at(moons, 3)
    _, judge = label_weights(held_out, batch)
    teacher, student = leaf(moons.teacher), leaf(moons.student)
    log_q = log_probs(teacher, batch.unlabeled)
    lesson = cross_entropy(log_q.exp(), log_probs(student, batch.unlabeled)).mean(1)
    slope = torch.autograd.grad(lesson.sum(), student, create_graph=True)
    moved = Net(*(w - RATE * g for w, g in zip(student, slope, strict=True)))
    after = (judge * cross_entropy(batch.targets, log_probs(moved, batch.labeled))).sum(1)
    expected = torch.autograd.grad(after.sum(), teacher, retain_graph=True)

    stepped = descend(student, gradient(lesson, student), RATE)
    term = feedback("exact", student, stepped, log_q.exp().detach(), log_q, batch, judge)
    for mine, theirs in zip(gradient(term, teacher), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)
        assert float(theirs.abs().max()) > 1e-8


def test_difference_is_zero_for_a_student_that_stands_still(moons: Problem) -> None:
    batch = batch_at(moons, 0)
    teacher = leaf(moons.teacher)
    log_q = log_probs(teacher, batch.unlabeled)
    target = pseudo_labels("argmax", log_q.detach(), batch.uniforms)
    _, judge = label_weights(False, batch)
    term = feedback("difference", moons.student, moons.student, target, log_q, batch, judge)
    assert torch.equal(term, torch.zeros_like(term))


def test_held_out_labels_are_one_of_each_class(moons: Problem) -> None:
    own, judge = label_weights(True, batch_at(moons, 0))
    assert own[0].tolist() == [0.25, 0.25, 0.0, 0.25, 0.25, 0.0]
    assert judge[0].tolist() == [0.0, 0.0, 0.5, 0.0, 0.0, 0.5]
    own, judge = label_weights(False, batch_at(moons, 0))
    assert torch.equal(own, judge) and own[0].tolist() == pytest.approx([1 / 6] * 6)


def test_sampled_labels_follow_the_teacher(moons: Problem) -> None:
    log_q = torch.tensor([[[0.7, 0.3], [0.2, 0.8], [0.2, 0.8]]], dtype=torch.float64).log()
    uniforms = torch.tensor([[0.29, 0.81, 0.79]], dtype=torch.float64)
    labels = {kind: pseudo_labels(kind, log_q, uniforms)[..., 1] for kind in ("sampled", "argmax")}
    assert labels["sampled"].tolist() == [[1.0, 0.0, 1.0]]
    assert labels["argmax"].tolist() == [[0.0, 1.0, 1.0]]


def test_own_soft_labels_without_augmentation_teach_nothing(moons: Problem) -> None:
    batch = batch_at(moons, 0)
    net = leaf(moons.teacher)
    log_p = log_probs(net, batch.unlabeled)
    slope = gradient(cross_entropy(log_p.exp().detach(), log_p).mean(1), net)
    assert max(float(g.abs().max()) for g in slope) < 1e-15


# --- the data ---


def test_labels_are_as_many_as_the_setting_says() -> None:
    for places in ("spread", "random"):
        data = problem("5/1", Options(draws=3, inits=2, steps=4, labels=places))
        assert data.labels.tolist() == [[0, 0, 0, 0, 0, 1]] * 6
        assert torch.equal(data.labeled[0], data.labeled[1])  # two initial weights of a draw
        assert not torch.equal(data.labeled[1], data.labeled[2])
        known = [{tuple(p) for p in run.tolist()} for run in data.labeled]
        for run in range(6):
            seen = data.points[data.batches[:, run].flatten()]
            assert not known[run] & {tuple(p) for p in seen.tolist()}
    assert data.points.shape == (2000, 2)


def test_settings_differ_only_in_labels(moons: Problem) -> None:
    other = problem("5/1", OPTIONS)
    both = stacked([moons, other])
    assert torch.equal(moons.points, other.points) and torch.equal(moons.batches, other.batches)
    assert torch.equal(both.teacher.weight1[:4], both.teacher.weight1[4:])
    assert torch.equal(both.labels[4:], other.labels) and both.batches.shape == (20, 8, BATCH)


# --- the numbers ---


def test_paired_spread_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).numpy()
    found = spread(values)
    assert found.mean == 4.0 and found.sd == pytest.approx((20 / 3) ** 0.5)
    assert found.se_runs == pytest.approx((20 / 3) ** 0.5 / 2)
    assert found.se_draws == pytest.approx(2.0)  # draw means 2 and 6: sd 8 ** 0.5, over 2 ** 0.5


def test_both_settings_at_once_are_each_alone(moons: Problem) -> None:
    problems = {"3/3": moons, "5/1": problem("5/1", OPTIONS)}
    contestant = CONTESTANTS["mpl_difference"]
    found = compete(contestant, problems, OPTIONS)  # type: ignore[arg-type]
    alone = train(contestant, problems["5/1"], OPTIONS.steps).student
    for mine, theirs in zip(found["5/1"].networks.student, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_the_same_seed_gives_the_same_numbers() -> None:
    def numbers(seed: int) -> str:
        options = Options(draws=2, inits=2, steps=10, seed=seed)
        names = with_baselines(["mpl_sampled"])
        assert names == ["labeled", "mpl_off_sampled", "mpl_sampled"]
        return as_json(study(names, options, lambda name, found: None), options)

    first = numbers(0)
    assert numbers(0) == first
    runs = [json.loads(t)["results"]["3/3"]["labeled"]["runs"] for t in (first, numbers(1))]
    assert runs[0] != runs[1]


# --- the command ---


def test_command_writes_numbers_table_and_figure(tmp_path: Path) -> None:
    sizes = ["--draws", "2", "--inits", "2", "--steps", "20", "--seed", "3"]
    command = [*COMMAND, *sizes, "--out", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    out = tmp_path / "new" / "out"
    names = ["two_moons.json", "two_moons.md", "two_moons.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert (out / "two_moons.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((out / "two_moons.json").read_text())
    assert numbers["settings"]["seed"] == 3 and numbers["versions"]["torch"] == torch.__version__
    table = (out / "two_moons.md").read_text()
    assert f"{len(CONTESTANTS)}/{len(CONTESTANTS)}" in done.stdout
    for setting in ("3/3", "5/1"):
        rows = numbers["results"][setting]
        here = [n for n, c in CONTESTANTS.items() if setting in c.settings]
        assert list(rows) == [n for n in here if n != "labeled_100"]  # 20 steps are all it has
        section = table.split(f"### {setting} labels")[1].split("###")[0]
        for row in rows.values():
            (line,) = [text for text in section.splitlines() if f"| {row['title']} |" in text[:60]]
            for key, form in (("accuracy", "{mean:.1f} ± {sd:.1f}"), ("difference", DIFFERENCE)):
                assert row[key] is None or form.format(**row[key]) in line
            every = torch.tensor(row["runs"])
            assert every.shape == (2, 2)
            assert float(every.mean()) == pytest.approx(row["accuracy"]["mean"], abs=0.01)
        assert rows["mpl_off"]["teacher_difference"]["mean"] == 0.0  # it is the labeled one


DIFFERENCE = "{mean:+.2f} ± {se_runs:.2f} ± {se_draws:.2f}"


@pytest.mark.parametrize(("steps", "there"), [(100, False), (101, True)])
def test_a_row_that_stops_early_is_left_out_of_a_run_as_short(steps: int, there: bool) -> None:
    options = Options(draws=2, inits=1, steps=steps)
    found = study(with_baselines(["labeled_100"]), options, lambda name, result: None)
    numbers = json.loads(as_json(found, options))["results"]
    names = ["labeled", "labeled_100"] if there else ["labeled"]
    assert [list(numbers[setting]) for setting in ("3/3", "5/1")] == [names, names]
    table = as_markdown(found, options)
    assert table.count("| labeled only, 100 steps |") == 2 * there
    # In its own row, and as what the other is compared with.
    assert table.count("| labeled only |") == 2 + 2 * there


def test_difference_is_paired_with_its_own_baseline() -> None:
    options = Options(draws=2, inits=2, steps=30)
    found = study(with_baselines(["mpl_off"]), options, lambda name, result: None)["5/1"]
    paired = gain(found, "mpl_off")
    assert paired is not None and gain(found, "labeled") is None
    expected = found["mpl_off"].accuracy - found["labeled"].accuracy
    assert paired.mean == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--draws", "1"], 2, "--draws: must be a whole number of at least 2, not '1'"),
        (["--steps", "many"], 2, "--steps: must be a whole number of at least 1, not 'many'"),
        (["--contestants", "mpl_exat"], 2, "'mpl_exat' does not exist; did you mean mpl_exact?"),
        (["--labels", "odd"], 2, "--labels: invalid choice: 'odd'"),
        (["--wrong"], 2, "unrecognized arguments: --wrong"),
        (["--out", "FILE"], 3, "is a file; name a folder"),
        (["--out", "FILE/below"], 3, "Not a directory"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str],
    code: int,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    out = tmp_path / "out"
    given = [o.replace("FILE", str(file)) for o in options]
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(out), *given])
    assert stop.value.code == code
    line = capsys.readouterr().err
    assert line.startswith("two_moons: error: ") and told in line and line.count("\n") == 1
    assert not out.exists() and file.read_text() == "mine"


def test_interrupted_it_leaves_nothing(tmp_path: Path) -> None:
    command = [*COMMAND, "--draws", "2", "--inits", "1", "--steps", "400", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and " 1/" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert problems.splitlines()[-1] == "two_moons: interrupted; nothing was written"
    assert "Traceback" not in problems and list(tmp_path.iterdir()) == []


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    old = tmp_path / "two_moons.json"
    old.write_text("of before")

    def text(path: Path) -> None:
        path.write_text("new")

    def broken(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    writers: dict[str, Callable[[Path], None]] = {"two_moons.json": text, "two_moons.md": broken}
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, writers)
    assert [p.name for p in tmp_path.iterdir()] == ["two_moons.json"]
    assert old.read_text() == "of before"
    writers["two_moons.md"] = text
    assert [p.name for p in write(tmp_path, writers)] == ["two_moons.json", "two_moons.md"]
    assert old.read_text() == "new" and len(list(tmp_path.iterdir())) == 2
