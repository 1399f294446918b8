"""An old config, run directory and checkpoint resume as if they had been written today."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.config import MPLConfig
from mpl_fast.config.aliases import (
    CHECKPOINT_KEYS,
    METRIC_NAMES,
    OPTION_NAMES,
    current_options,
    renamed,
)
from mpl_fast.config.command_line import as_yaml, parse
from mpl_fast.training.checkpoint import read_shared
from tests.algorithms.problems import assert_same
from tests.tiny_run import ROOT, final_state, replace_state, rows, run_in_turn

OLD = ROOT / "tests" / "golden" / "old_run"
CHECKPOINT = Path("checkpoints") / "step_00000004"
CLOCK = {"train_seconds", "data_wait", "images_per_second"}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The run resumed from its old files, the same from files with today's names, and stderr."""
    folder = tmp_path_factory.mktemp("old_run")
    old, new = folder / "old", folder / "new"
    shutil.copytree(OLD / "run", old)
    shutil.copytree(OLD / "run", new)
    today = folder / "today.yaml"
    today.write_text(as_yaml(parse(["--config", str(OLD / "config.yaml"), *places(new)])))
    with_todays_names(new, today)
    done = run_in_turn(
        ["--config", str(OLD / "config.yaml"), *places(old)],
        ["--config", str(today), *places(new)],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming after step 4") == 2
    return old, new, done.stderr


def places(run_dir: Path) -> list[str]:
    return ["--data.root", str(OLD / "rec"), "--run-dir", str(run_dir)]


def with_todays_names(run_dir: Path, config: Path) -> None:
    """Rewrites the files of an old run directory as the present program would have."""
    shutil.copy(config, run_dir / "config.yaml")
    lines = [renamed(row, METRIC_NAMES) for row in rows(run_dir)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    folder = run_dir / CHECKPOINT
    shared, mine = load(folder / "state.pt"), load(folder / "rank_0.pt")
    assert {"voters", "seconds"} <= shared.keys()
    position = current_options(json.loads(mine["data"]["made_with"]))
    mine["data"]["made_with"] = json.dumps(position, sort_keys=True)
    replace_state(folder / "state.pt", renamed(shared, CHECKPOINT_KEYS))
    replace_state(folder / "rank_0.pt", mine)


def load(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_the_golden_files_have_old_names() -> None:
    written = (OLD / "config.yaml").read_text()
    leaves = {name.rpartition(".")[2] for name in OPTION_NAMES} - {"student_wait"}
    assert all(f"{leaf}:" in written for leaf in leaves)
    first = rows(OLD / "run")[0]
    assert {"h", "seconds"} <= first.keys() and not {"feedback", "train_seconds"} & first.keys()


def test_an_old_run_ends_bit_for_bit_as_one_with_todays_names(
    resumed: tuple[Path, Path, str],
) -> None:
    old, new, printed = resumed
    assert_same(final_state(old), final_state(new), ignore=("seconds",))
    assert printed.count("uses old option names") == 1
    assert printed.count("was written before class names were stored") == 2


def test_an_old_run_ends_as_the_program_of_then_ended_it(resumed: tuple[Path, Path, str]) -> None:
    """Its numbers, but for what differs between CPUs."""
    expected = json.loads((OLD / "expected.json").read_text())
    norms = {
        f"{name}.{part}.{key}": value.double().norm().item()
        for name, learner in final_state(resumed[0])["learners"].items()
        for part in ("network", "average")
        for key, value in (learner[part] or {}).items()
    }
    assert norms == pytest.approx(expected["norms"], rel=1e-4)
    (last,) = [row for row in rows(resumed[0]) if row["step"] == 6 and "train_seconds" in row]
    row = {key: value for key, value in last.items() if key not in CLOCK}
    assert row == pytest.approx(expected["row"], rel=1e-4, abs=1e-5)


def test_metrics_of_an_old_run_have_one_column_for_each_quantity(
    resumed: tuple[Path, Path, str],
) -> None:
    found = rows(resumed[0])
    assert not set(METRIC_NAMES) & {key for row in found for key in row}
    trained = [row for row in found if "loss/labeled" in row]
    assert [row["step"] for row in trained] == [2, 4, 6]
    assert trained[0].keys() == trained[1].keys() == trained[2].keys()
    before = [renamed(row, METRIC_NAMES) for row in rows(OLD / "run")]
    assert found[: len(before)] == before
    summary = json.loads((resumed[0] / "summary.json").read_text())
    assert "train_seconds" in summary and "seconds" not in summary


def test_an_old_checkpoint_is_read_as_it_is() -> None:
    old, shared = load(OLD / "run" / CHECKPOINT / "state.pt"), read_shared(OLD / "run" / CHECKPOINT)
    assert shared["eval_ensemble"] == old["voters"]
    assert shared["train_seconds"] == old["seconds"]
    assert_same(shared["learners"], old["learners"])
    assert_same(shared["algorithm"], old["algorithm"])


def test_an_old_config_is_the_config_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    own = parse(["--config", str(OLD / "run" / "config.yaml"), *places(Path("r"))])
    given = parse(["--config", str(OLD / "config.yaml"), *places(Path("r")), "--stop-at", "4"])
    given = replace(given, compile="off", cuda_graphs="off")  # the defaults of that time
    assert own == given and own.data.crop == "pad_crop" and own.grad_sync == "allreduce"
    assert isinstance(own.algorithm, MPLConfig)
    assert own.algorithm.teacher.max_grad_norm == 3 and own.algorithm.student.delay_steps == 1
    assert capsys.readouterr().err.count("warning: ") == 2
