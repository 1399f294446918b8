"""Sweeps of tiny trainings: killed outright and continued, pruned, diverged, and refused; and that
the images which choose are in no training split."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.pruners import NopPruner
from optuna.trial import TrialState, create_trial

from mpl_fast.config import RunConfig
from mpl_fast.config.command_line import as_arguments, as_yaml, parse
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import ConfigError, OutputError, UserError
from mpl_fast.sweep.command import main
from mpl_fast.sweep.held_out import hold_out
from mpl_fast.sweep.process import slots
from mpl_fast.sweep.ranges import draw, read_ranges
from mpl_fast.sweep.study import Storage, Trials
from tests.packing.packs import jpeg, read_record, split_line, with_magic
from tests.packing.small_pack import make_pack
from tests.tiny_run import ROOT, arguments, environment, rows

LR = "algorithm.learner.lr"


def options(
    folder: Path, rec: Path, ranges: str, *more: str, recipe: str = "supervised"
) -> list[str]:
    """A command line; all labeled images but ten train."""
    common = arguments(folder / "unused", rec, recipe=recipe)[:-2]
    (folder / "ranges.yaml").write_text(ranges)
    own = ["--ranges", str(folder / "ranges.yaml"), "--out", str(folder / "sweep")]
    return [*common, *own, "--held-out", "50%", *more]


def study(folder: Path) -> optuna.Study:
    storage = f"sqlite:///{folder / 'sweep' / 'sweep.db'}"
    return optuna.load_study(study_name=None, storage=storage)


@pytest.mark.slow
def test_a_killed_sweep_continues_its_trial(
    tiny_rec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = options(tmp_path, tiny_rec, f"{LR}: {{low: 0.001, high: 0.1, log: true}}")
    line += ["--steps", "40", "--eval-every", "20", "--trials", "1"]
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), *line]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    folder = tmp_path / "sweep" / "trials" / "0000"
    deadline = time.monotonic() + 1800
    while not list(folder.glob("checkpoints/step_*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    before = first.communicate()[0]
    assert "trial 0: begins" in before and "1/1 ended" not in before
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "trial 0: continues" in printed and "1/1 ended" in printed
    assert "resuming after step" in _log(tmp_path, 0)
    (trial,) = study(tmp_path).trials
    assert trial.state == TrialState.COMPLETE
    evaluated = {row["step"]: row["eval/top1"] for row in rows(folder) if "eval/top1" in row}
    assert [*evaluated] == [20, 40]
    assert trial.intermediate_values == evaluated and trial.value == evaluated[40]
    assert trial.params == {LR: 0.05}, "the first has the config's own values"
    config = yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())
    assert (config["steps"], config["data"]["root"], config["run_dir"]) == (40, str(tiny_rec), "")


@pytest.mark.parametrize("place", ["sqlite", "journal"])
def test_a_trial_has_one_worker_and_is_continued_when_it_has_none(
    place: str, tmp_path: Path
) -> None:
    workers = [Trials(tmp_path, Storage(place), NopPruner(), 3) for _ in range(2)]
    for worker in workers:
        with worker.locked():
            worker.open({"held_out": "20%"}, {"x": 0.5}, lambda: None, {})
    kinds = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    one, two = workers
    first, second = one.claim(3), two.claim(3)
    assert first and second and [c.trial.number for c in (first, second)] == [0, 1]
    values = [draw(claim.trial, kinds)["x"] for claim in (first, second)]
    first.lock.close()  # as by the end of its worker
    again = two.claim(3)
    assert again and again.again and again.trial.number == 0
    assert draw(again.trial, kinds)["x"] == values[0] == 0.5
    third = one.claim(3)
    assert third and third.trial.number == 2 and draw(third.trial, kinds)["x"] != values[1]
    assert one.claim(3) is None and two.claim(3) is None
    one.study.tell(third.trial, 1.0)
    third.lock.close()
    assert one.claim(3) is None, "a trial that has ended is not continued"


@pytest.mark.slow
def test_a_trial_behind_others_is_pruned_and_a_diverged_one_has_its_error(
    tiny_rec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = options(tmp_path, tiny_rec, f"{LR}: [0.05, 1.0e+30]", "--steps", "400", "--trials", "7")
    line += ["--jobs", "2" if len(os.sched_getaffinity(0)) > 1 else "1", "--eval_every", "20"]
    assert main([*line, "--timeout", "0s"]) == 0
    assert "7 trials left; the same command continues" in capsys.readouterr().out
    (kind,) = read_ranges(line[line.index("--ranges") + 1], _config(line)).values()
    for _ in range(5):  # as if trials had been perfect at their first evaluation
        study(tmp_path).add_trial(
            create_trial(
                value=100.0,
                params={LR: 0.05},
                distributions={LR: kind},
                intermediate_values={20: 101.0},
            )
        )
    study(tmp_path).enqueue_trial({LR: 1e30})
    assert main(line) == 0
    printed = capsys.readouterr().out
    pruned, *_, failed = study(tmp_path).trials
    assert (pruned.state, failed.state) == (TrialState.PRUNED, TrialState.FAIL)
    # Later evaluations, too, where the training went on until the signal reached it.
    assert min(pruned.intermediate_values) == 20 and 400 not in pruned.intermediate_values
    assert "trial 0: pruned at step 20 in" in printed
    assert "stopped by a signal after step" in _log(tmp_path, 0)
    assert not (tmp_path / "sweep" / "trials" / "0000" / "checkpoints").exists()
    assert failed.user_attrs["reason"].startswith("not finite: ")
    assert f"trial 6: failed: {failed.user_attrs['reason']}" in printed
    assert "5 complete trials, 1 pruned, 1 failed" in printed
    with (tmp_path / "sweep" / "trials.csv").open() as file:
        table = [(row["number"], row["state"], row[LR]) for row in csv.DictReader(file)]
    assert table[0] == ("0", "pruned", "0.05") and table[-1] == ("6", "fail", "1e+30")
    assert [state for _, state, _ in table[1:-1]] == ["complete"] * 5
    config = yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())
    assert config["algorithm"]["learner"]["lr"] == 0.05
    for name in ("optimization_history", "param_importances", "slice", "parallel_coordinate"):
        assert (tmp_path / "sweep" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(line) == 0, "nothing is left to do"
    assert "begins" not in capsys.readouterr().out and len(study(tmp_path).trials) == 7


def test_an_error_that_all_trials_have_ends_the_sweep(tiny_rec: Path, tmp_path: Path) -> None:
    """The range is right, and wrong together with the recipe."""
    line = options(tmp_path, tiny_rec, "unlabeled_batch: [0]", "--jobs", "1", recipe="uda")
    with pytest.raises(
        ConfigError, match=r"^every trial ends so: unlabeled_batch must be at least"
    ):
        main(line)
    trials = study(tmp_path).trials
    assert [trial.state for trial in trials] == [TrialState.PRUNED] * 3
    assert all("not 0" in trial.user_attrs["reason"] for trial in trials)


def test_drawn_values_reach_the_training_as_they_are(tiny_rec: Path, tmp_path: Path) -> None:
    text = """
        data: {flip: [no], num_ops: {low: 3, high: 4, step: 2}, mean: ["[0.5, 0.25, 0.125]"]}
        algorithm.learner.lr: {low: 1.0e-9, high: 1.0e-9, log: true}
        model: {pretrained: [""], norm: [sync]}
        """
    line = options(tmp_path, tiny_rec, text)
    ranges = read_ranges(str(tmp_path / "ranges.yaml"), _config(line))
    drawn = draw(optuna.create_study().ask(), ranges)
    config = parse([*line[:4], "--run-dir", "x", *as_arguments(drawn)])
    assert (config.data.flip, config.data.num_ops) == (False, 3)
    assert config.data.mean == (0.5, 0.25, 0.125)
    assert (config.model.pretrained, config.model.norm) == ("", "sync")
    assert yaml.safe_load(as_yaml(config))["algorithm"]["learner"]["lr"] == 1e-9


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (f"steps: [4, 6]\n{LR}: {{low: -1, high: 1}}", rf":2: {LR} must be at least 0, not -1"),
        (f"{LR}: {{low: 0.3, high: 0.1}}", rf":1: {LR}: low 0.3 is above high 0.1"),
        (
            f"{LR}: {{low: 0, high: 0.1, log: true}}",
            rf":1: {LR}: with log: true, low must be above",
        ),
        (f"{LR}: {{low: 0.1}}", rf":1: {LR} takes .*: high is missing"),
        (f"{LR}: 0.1", rf":1: {LR} takes a list of choices, or .*, not 0.1"),
        (
            "algorithm: {learner: {lrr: [1]}}",
            rf":1: unknown key algorithm.learner.lrr .*mean {LR}\?",
        ),
        ("algorithm: {learner: {lr: {low: 1, hi: 2}}}", rf":1: {LR} takes .*, not hi"),
        ("data.num_ops: {low: 1, high: 2.5}", ":1: data.num_ops must be a whole number, not 2.5"),
        ("data.policy: [mpl, dalli]", ":1: data.policy must be mpl, .*, not dalli"),
        ("data.policy: {low: 1, high: 2}", ":1: data.policy is no number"),
        ("labeled_batch: [4, 4]", ":1: labeled_batch has a choice twice"),
        ("recipe: [mpl, uda]", ":1: recipe cannot be searched"),
        ("seed: [1, 2]", "--seed is given, and .* has a range for it"),
    ],
)
def test_wrong_ranges_are_refused_before_anything_is_written(
    ranges: str, message: str, tiny_rec: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        main(options(tmp_path, tiny_rec, ranges, "--seed", "1"))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run-dir", "x"], "--run-dir is set by --out"),
        (["--stop-at", "3"], "stop_at is 3"),
        (["--then", "finetune"], "then is not for a sweep"),
        (["--jobs", "999"], "--jobs 999 with 1 rank each is more than .* CPU cores?: give"),
        (["--held-out", "19"], "--held-out 19: that is 19 images, but at most 10 can be drawn"),
        (["--storage", "what"], "--storage: give sqlite, journal or the URL of a database"),
        (["--storage", "mysql://a:b@c/d"], r"--storage mysql://a:\*\*\*@c/d cannot be used: "),
        (["--timeout", "2x"], "argument --timeout: must be a time such as 90m"),
        (["--labeled-batch", "0"], "labeled_batch must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_one_line(
    more: list[str], message: str, tiny_rec: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        main(options(tmp_path, tiny_rec, "data.num_ops: [1, 2]", *more))
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_a_sweep_may_be_moved_and_the_folder_of_something_else_is_left_as_it_is(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec = Path(shutil.copytree(tiny_rec, tmp_path / "rec"))
    line = options(tmp_path, rec, "data.num_ops: [1, 2]", "--timeout", "0s")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "rec").symlink_to(tiny_rec)
    with pytest.raises(OutputError, match="holds rec; name a new folder"):
        main(line)
    (tmp_path / "sweep" / "rec").unlink()
    (tmp_path / "sweep" / "sweep.db-journal").touch()  # as of a start that was killed
    assert main(line) == 0
    (tmp_path / "sweep").rename(tmp_path / "moved")
    stored = json.loads((tmp_path / "moved" / "sweep.json").read_text())
    del stored["config"]["data"]["antialias"]  # as by a version without this option
    (tmp_path / "moved" / "sweep.json").write_text(json.dumps(stored))
    rec.rename(tmp_path / "run_dir")  # its name is no option --run-dir
    monkeypatch.chdir(tmp_path)
    line[line.index("--out") + 1], line[line.index("--data.root") + 1] = "moved", "./run_dir"
    assert main([*line, "--lock", "false"]) == 0  # on a file system without locks
    with pytest.raises(ConfigError, match=r"another sweep: config.steps was 6 and is 8; use anoth"):
        main([*line, "--steps", "8"])
    with pytest.raises(ConfigError, match="another sweep: held_out was 50% and is 20%"):
        main([*line, "--held-out", "20%"])


@pytest.mark.parametrize("name", ["optuna", "matplotlib"])
def test_a_missing_package_is_named(
    name: str, tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.startswith("mpl_fast.sweep.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"^{name} is missing: pip install 'mpl_fast\[sweep\]'"):
        main(options(tmp_path, tiny_rec, "data.num_ops: [1, 2]", "--timeout", "0s"))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "shards",
    [{"train": (5, 8, 6), "val": (2,)}, {"train_label": (9,), "train_unlabel": (10,), "val": (2,)}],
    ids=["shared", "separate"],
)
def test_held_out_images_are_in_no_training_split(
    shards: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    layout = "shared" if "train" in shards else "separate"
    first = with_magic(jpeg(1))  # as `make_pack` has it
    copies = {9: jpeg(0), 10: first, **{9 + i: jpeg(i) for i in range(2, 8)}, 8: jpeg(5)}
    pack = make_pack(
        tmp_path / "rec", shards=shards, labeled=range(9), layout=layout, images=copies
    )
    out = tmp_path / "held"
    hold_out(pack.root, out, "4", 0)
    whole, found = (
        {name: contents(root, name) for name in ("labeled", "unlabeled", "val")}
        for root in (pack.root, out)
    )
    assert len(found["val"]) == 4 and found["val"] <= whole["labeled"]
    held = {image for _, image in found["val"]}
    for name in ("labeled", "unlabeled"):
        assert found[name] == {entry for entry in whole[name] if entry[1] not in held}
    again = tmp_path / "again"
    hold_out(pack.root, again, "4", 0)
    assert contents(again, "val") == found["val"]
    hold_out(pack.root, tmp_path / "other", "4", 1)
    assert contents(tmp_path / "other", "val") != found["val"]
    assert all(file.is_symlink() for file in out.glob("*.rec"))


def contents(root: Path, name: str) -> set[tuple[str, bytes]]:
    """Listed name and payload, without the header, of each record of a split."""
    split = read_manifest(root).splits[name]
    joined = b"".join(file.read_bytes() for file in split.shards)
    places = dict(split_line(line) for line in split.index.read_bytes().splitlines())
    listed = [split_line(line) for line in split.listing.read_bytes().splitlines()]
    assert len(listed) == len(places) == split.records
    return {(key, read_record(joined, int(places[i]))[24:]) for i, _, key in listed}


def test_gpus_are_given_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,7,6")
    devices = [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(RunConfig(), 2, 0, 9)]
    assert devices == ["4,5", "GPU-a,7"]
    with pytest.raises(ConfigError, match="--jobs 3 with 2 ranks each is more than 5 GPUs: give 2"):
        slots(RunConfig(), 2, 3, 9)
    with pytest.raises(ConfigError, match="--ranks-per-trial 6 needs as many GPUs"):
        slots(RunConfig(), 6, 0, 9)
    assert "CUDA_VISIBLE_DEVICES" not in slots(RunConfig(device="cpu"), 1, 1, 9)[0]


def test_only_gpus_that_work_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed because it found no driver\nexit 9\n")
    program.chmod(0o755)
    assert "CUDA_VISIBLE_DEVICES" not in slots(RunConfig(), 1, 1, 1)[0]
    lines = ("GPU 0: A (UUID: x)", "  MIG 1g.5gb Device 0: (UUID: y)", "GPU 1: B (UUID: z)")
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(RunConfig(), 1, 0, 9)] == ["0", "1"]


def _config(line: list[str]) -> RunConfig:
    return parse([*line[:4], "--run-dir", "x"])


def _log(folder: Path, number: int) -> str:
    return (folder / "sweep" / "trials" / f"{number:04d}" / "train.log").read_text()
