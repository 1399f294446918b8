"""Options, YAML and defaults meet in one config; every slip is one clear line."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

from mpl_fast.config import RECIPES, MPLConfig, UDAConfig
from mpl_fast.config.command_line import as_yaml, fail, parse
from mpl_fast.errors import ConfigError
from tests.tiny_run import ROOT, TRAIN

HERE = ["--run-dir", "r", "--data.root", "d"]
ROLES = ["--recipe", "mpl_roleplay"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return str(file)


def test_options_override_yaml_which_overrides_defaults(tmp_path: Path) -> None:
    yaml = "recipe: uda\nsteps: 7\nseed: 3\nalgorithm: {learner: {lr: 1e-3}}\n"
    config = parse(
        ["--config", written(tmp_path, yaml), *HERE, "--steps=9", "--data.image-size", "32"]
    )
    assert isinstance(config.algorithm, UDAConfig)
    assert (config.steps, config.seed, config.log_every) == (9, 3, 50)
    assert config.algorithm.learner.lr == 1e-3
    assert config.data.image_size == 32 and config.data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("equals", [False, True])
def test_options_override_yaml_wherever_they_stand(equals: bool, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: uda\nsteps: 10\nlabeled_batch: 3\n")
    named = [f"--config={file}"] if equals else ["--config", str(file)]
    config = parse(["--steps", "7", *HERE, *named, "--seed", "5"])
    assert (config.recipe, config.steps, config.labeled_batch, config.seed) == ("uda", 7, 3, 5)


def test_recipe_on_the_command_line_decides() -> None:
    assert isinstance(parse([*HERE, "--recipe", "mpl"]).algorithm, MPLConfig)
    for name, kind in RECIPES.items():
        assert isinstance(parse([*HERE, f"--recipe={name}", *needed(name)]).algorithm, kind)


def needed(recipe: str) -> list[str]:
    """What a recipe cannot do without, besides folders."""
    return ["--algorithm.start", "s"] if recipe == "finetune" else []


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_shipped_configs_parse_and_say_what_they_cost(file: Path) -> None:
    words = file.stem.split("_")
    config = parse(["--config", str(file), *HERE, *needed(words[-1])])
    comment = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert "Command:" in comment
    if words[0] != "ablation":  # which is several runs
        assert "Cost" in comment and config.recipe.removeprefix("mpl_") in words


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse(["--config", str(CONFIGS[0]), *HERE, "--seed", "5"])
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(config))
    assert parse(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stepz", "3"], "unknown option --stepz of recipe mpl; did you mean --steps?"),
        (["--rundir", "x"], "did you mean --run-dir?"),
        (["--lr", "3"], r"did you mean --algorithm\.teacher\.lr?"),
        (["--data.magnitud=3"], "did you mean --data.magnitude?"),
        (["-x"], "unknown option -x"),
        (["--steps", "many"], "steps must be a whole number, not many"),
        (["--steps", "1.5"], "steps must be a whole number, not 1.5"),
        (["--data.crop", "cifr"], "data.crop must be random_resized or pad_crop, not cifr"),
        (["--steps", "0"], "steps must be at least 1, not 0"),
        (["--labeled-batch", "-4"], "labeled_batch must be at least 1, not -4"),
        (["--data.flip", "maybe"], "data.flip must be true or false, not maybe"),
        (["--recipe", "mlp"], "recipe 'mlp' does not exist; did you mean mpl?"),
        (["--recipe"], "--recipe needs a value"),
        (["--algorithm.consistency.temperature", "0"], "temperature must be above 0"),
        (["--algorithm.student.ema", "1"], r"algorithm.student.ema must be in \[0, 1\)"),
        (["--algorithm.label_smoothing", "1"], "algorithm.label_smoothing"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--eval-epochs", "-1"], "eval_epochs must be at least 0"),
        (["--algorithm.feedback", "exat"], "algorithm.feedback must be off, difference,"),
        (
            ["--algorithm.feedback=exact", "--algorithm.labels=argmax"],
            r"algorithm\.feedback exact needs labels soft \(or auto\), not argmax",
        ),
        (
            ["--algorithm.feedback=sampled", "--algorithm.labels=soft"],
            r"algorithm\.feedback sampled needs labels sampled \(or auto\), not soft",
        ),
        (["--algorithm.labels=soft"], r"algorithm\.feedback difference has no gradient"),
        (
            ["--algorithm.feedback=exact", "--algorithm.student.optimizer=adamw"],
            r"algorithm\.student\.optimizer must be sgd for this feedback",
        ),
        (
            [*ROLES, "--algorithm.feedback=per_example", "--algorithm.teacher.optimizer=adamw"],
            r"algorithm\.teacher\.optimizer must be sgd for this feedback",
        ),
        (
            ["--recipe=smpl", "--algorithm.feedback=exact", "--algorithm.learner.optimizer=adamw"],
            r"algorithm\.learner\.optimizer must be sgd for this feedback",
        ),
        (
            [*ROLES, "--algorithm.feedback=parity_kekmodel"],
            r"algorithm\.feedback parity_kekmodel is for recipe mpl",
        ),
        (
            ["--algorithm.feedback=parity_google", "--algorithm.bn-batches=split"],
            r"algorithm\.bn_batches cannot be chosen with feedback parity_google",
        ),
        (
            ["--algorithm.feedback=exact", "--algorithm.baseline=0.9"],
            r"algorithm\.baseline is subtracted from a difference: feedback exact has none",
        ),
        (["--cuda-graphs=model"], "cuda_graphs model is of compiled networks: give --compile"),
        (
            ["--cuda-graphs=step", "--algorithm.feedback=exact"],
            "cuda_graphs step cannot repeat a step that draws its dropout again",
        ),
        (
            ["--cuda-graphs=step", "--algorithm.teacher-graph=recompute"],
            "cuda_graphs step cannot repeat a step that draws its dropout again",
        ),
        (["--cuda-graphs=step", "--grad-sync=ddp"], "cuda_graphs step needs grad_sync allreduce"),
        (["--microbatches=2", "--grad-sync=ddp"], "microbatches above 1 need grad_sync allreduce"),
        (["--microbatches=0"], "microbatches must be at least 1, not 0"),
        (
            ["--recipe=smpl", "--microbatches=2"],
            "microbatches must be 1 for recipe smpl, whose step takes its batch whole",
        ),
        (
            ["--algorithm.feedback=parity_google", "--microbatches=2"],
            "microbatches must be 1 for feedback parity_google",
        ),
        (
            [
                "--algorithm.teacher.optimizer-backend=apex",
                "--algorithm.teacher.optimizer=adamw",
            ],
            r"algorithm\.teacher\.optimizer_backend apex is for optimizer sgd: take torch",
        ),
        (
            ["--cuda-graphs=step", "--algorithm.student.optimizer-backend=apex"],
            r"algorithm\.student\.optimizer_backend apex takes its learning rate by value",
        ),
        (["--model.norm=sync", "--compile=default"], r"model\.norm sync cannot be compiled"),
        (["--recipe=finetune"], r"algorithm\.start is missing: give --algorithm\.start RUN_DIR"),
        (
            ["--recipe=finetune", "--algorithm.start=s", "--model.pretrained=timm"],
            r"model\.pretrained is not for recipe finetune, which begins with algorithm\.start",
        ),
        (["--model.frozen=true"], r"model\.frozen .* give --model\.pretrained FILE too"),
        (
            ["--algorithm.teacher.milestones=[100]"],
            r"algorithm\.teacher\.milestones must be empty for schedule cosine, not \(100,\)",
        ),
        (
            ["--algorithm.student.schedule=step"],
            r"algorithm\.student\.milestones must be the rising steps of schedule step, not \(\)",
        ),
        (
            ["--algorithm.student.schedule=step", "--algorithm.student.milestones=[9,5]"],
            r"algorithm\.student\.milestones must be the rising steps of schedule step",
        ),
        ([*ROLES, "--algorithm.swap-every=-1"], r"algorithm\.swap_every must be at least 0"),
        (
            ["--algorithm.labels=sampled"],
            "algorithm.labels sampled need feedback sampled, which credits the view they come from",
        ),
        (
            ["--algorithm.feedback=off", "--algorithm.held-out=0.5"],
            "algorithm.held_out is for a feedback to judge by: feedback is off",
        ),
        (
            ["--algorithm.label-threshold=1.5"],
            r"algorithm\.label_threshold must be in \[0, 1\], not 1\.5",
        ),
        (
            ["--algorithm.consistency.threshold=1.5"],
            r"algorithm\.consistency\.threshold must be in \[0, 1\], not 1\.5",
        ),
        (["--steps=3", "--epochs=2"], "--steps and --epochs say the same thing twice: give one"),
        (["--algorithm.held-out=1"], r"algorithm\.held_out must be in \[0, 1\)"),
        (["--recipe=metasemi", "--algorithm.epsilon=0"], r"algorithm\.epsilon must be above 0"),
        (["--recipe=fixmatch", "--unlabeled-batch=0"], "unlabeled_batch must be at least 1"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_a_slip_is_one_clear_line(options: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as told:
        parse([*HERE, *options])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("rank", "alone"), [("0", False), ("1", False), ("1", True)])
def test_the_rank_that_tells_of_an_error_ends_first(
    rank: str, alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise torchrun may end it before it has told."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", waited.append)
    error = ConfigError("wrong")
    error.alone = alone
    with pytest.raises(SystemExit) as ended:
        fail("train", error)
    tells = rank == "0" or alone
    assert ended.value.code == 2 and bool(waited) is not tells
    assert capsys.readouterr().err == ("train: error: wrong\n" if tells else "")


def test_who_does_not_train_needs_no_algorithm(tmp_path: Path) -> None:
    file = written(tmp_path, "recipe: finetune\ndata: {image_size: 32}\n")
    with pytest.raises(ConfigError, match="start is missing"):
        parse(["--config", file, *HERE])
    assert parse(["--config", file, *HERE], for_training=False).data.image_size == 32
    with pytest.raises(ConfigError, match=r"data\.num_ops"):
        parse(["--config", file, *HERE, "--data.num_ops=-1"], for_training=False)


def test_steps_on_the_command_line_win_over_epochs_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "epochs: 9\neval_epochs: 2\n")
    assert parse(["--config", file, *HERE]).epochs == 9
    short = parse(["--config", file, *HERE, "--steps", "10", "--eval-every", "5"])
    assert (short.steps, short.epochs, short.eval_every, short.eval_epochs) == (10, 0, 5, 0)
    longer = parse(["--config", file, *HERE, "--epochs", "20"])
    assert (longer.epochs, longer.eval_epochs) == (20, 2)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        (
            "steps: 3\ndata:\n  magnitud: 3\n",
            r"c.yaml:3: unknown key data.magnitud.*data.magnitude",
        ),
        ("recipe: uda\nalgorithm: {student: {lr: 1}}\n", "c.yaml:2: unknown key algorithm.student"),
        ("steps: [3\n", "c.yaml is not YAML"),
        ("- 3\n", "must hold keys and values"),
        ("# nothing\n", "c.yaml is empty"),
        (
            "data: {mean: 0.5}\n",
            r"c.yaml:1: data.mean must be a list such as \[1,2,3\], not 0.5",
        ),
        ("steps: 3.5\n", r"c.yaml:1: steps must be a whole number, not 3.5"),
        (
            "seed: 1\ndata:\n  crop: cifr\n",
            "c.yaml:3: data.crop must be random_resized or pad_crop",
        ),
        ("recipe: [1]\n", "recipe"),
        ("steps: 3\ndata:\n", "c.yaml:2: data has no value"),
        ("steps: 3\nseed: 1\nsteps: 4\n", "c.yaml:3: steps stands here for the second time"),
    ],
)
def test_a_slip_in_yaml_names_the_line(yaml: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(["--config", written(tmp_path, yaml), *HERE])


@pytest.mark.parametrize("missing", [0, 2])
def test_missing_folders_are_asked_for(missing: int) -> None:
    with pytest.raises(ConfigError, match="is missing: give --"):
        parse(HERE[missing : missing + 2])


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_explains_every_option_of_a_recipe(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inherited ones too: a name, and words before its type."""
    with pytest.raises(SystemExit):
        parse(["--recipe", recipe, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for key in leaves(RECIPES[recipe], "algorithm."):
        name = re.escape(f"--{key} ")
        assert re.search(rf"{name}(\S+ )?[A-Za-z0-9]\w*\W.{{3,}}?\(type: ", told), key
        assert not re.search(rf"{name}\S+ \(type: ", told), f"{key} has no words"


def leaves(config: type, prefix: str) -> Iterator[str]:
    """Every option of a config class and of those in it."""
    hints = get_type_hints(config)
    for item in dataclasses.fields(config):
        inner = hints[item.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from leaves(inner, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'nvidia', 'tensorboardX', 'timm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--algorithm.teacher.lr" in done.stdout and "Steps at learning rate 0" in done.stdout
