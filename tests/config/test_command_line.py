"""Options, YAML and defaults become one config; each mistake is one clear line."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpl_fast import atomic
from mpl_fast.config import RECIPES, FinetuneConfig, MPLConfig, RunConfig, UDAConfig
from mpl_fast.config.command_line import as_yaml, parse, phases
from mpl_fast.config.fields import all_options, replaced
from mpl_fast.config.values import choices
from mpl_fast.errors import ConfigError
from tests.tiny_run import ROOT, TRAIN

HERE = ["--run-dir", "r", "--data.root", "d"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return str(file)


def needed(recipe: str) -> list[str]:
    """Options without which a recipe is refused, besides folders."""
    runs = {"finetune": "start", "noisy_student": "teacher"}
    return [f"--algorithm.{runs[recipe]}", "s"] if recipe in runs else []


def test_options_override_yaml_which_overrides_defaults(tmp_path: Path) -> None:
    yaml = "recipe: uda\nsteps: 7\nseed: 3\nalgorithm: {learner: {lr: 1e-3}}\n"
    config = parse(
        ["--config", written(tmp_path, yaml), *HERE, "--steps=9", "--data.image-size", "32"]
    )
    assert isinstance(config.algorithm, UDAConfig)
    assert (config.steps, config.seed, config.log_every) == (9, 3, 50)
    assert config.algorithm.learner.lr == 1e-3
    assert config.algorithm.learner.ema == UDAConfig().learner.ema
    assert config.data.image_size == 32 and config.data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("equals", [False, True])
def test_options_override_yaml_wherever_they_stand(equals: bool, tmp_path: Path) -> None:
    file = written(tmp_path, "recipe: uda\nsteps: 10\nlabeled_batch: 3\n")
    named = [f"--config={file}"] if equals else ["--config", file]
    config = parse(["--steps", "7", *HERE, *named, "--seed", "5"])
    assert (config.recipe, config.steps, config.labeled_batch, config.seed) == ("uda", 7, 3, 5)


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("steps", "700_000", 700_000),
        ("epochs", "1e2", 100.0),
        ("algorithm.feedback_weight", "-1", -1.0),
        ("deterministic", "true", True),
        ("deterministic", "no", False),
        ("compile", "off", "off"),
        ("run_dir", "007", "007"),
        ("run_dir", "a=b", "a=b"),
        ("data.mean", "[0.1, 0.2,1]", (0.1, 0.2, 1.0)),
        ("algorithm.teacher.milestones", "[]", ()),
    ],
)
def test_values_have_the_types_of_their_fields(
    option: str, text: str, value: object, tmp_path: Path
) -> None:
    section, _, name = option.rpartition(".")
    yaml = f"{name}: {text}\n"
    for outer in reversed(section.split(".") if section else []):
        yaml = f"{outer}:\n" + "".join(f"  {line}\n" for line in yaml.splitlines())
    given = [f"--{option}={text}", f"--{option.replace('_', '-')}={text}"]
    given += [f"--config={written(tmp_path, yaml)}"]
    for argument in given:
        found: Any = parse([*HERE, argument] if name != "run_dir" else [*HERE[2:], argument])
        for part in option.split("."):
            found = getattr(found, part)
        assert (found, type(found)) == (value, type(value))


def test_recipe_on_the_command_line_decides(tmp_path: Path) -> None:
    assert isinstance(parse([*HERE, "--recipe", "mpl"]).algorithm, MPLConfig)
    file = written(tmp_path, "recipe: mpl\n")
    for name, kind in RECIPES.items():
        config = parse([*HERE, "--config", file, f"--recipe={name}", *needed(name)])
        assert isinstance(config.algorithm, kind) and config.recipe == name


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_shipped_configs_parse_and_state_their_cost(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = file.stem.split("_")
    recipe = next(name for name in RECIPES if f"\nrecipe: {name}\n" in file.read_text())
    parse(["--config", str(file), *HERE, *needed(recipe)])
    comment = "".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert "Command:" in comment
    if words[0] != "ablation":  # which is several runs
        assert "Cost" in comment
        assert words[-1] == "best" or f"_{recipe.removeprefix('mpl_')}_" in f"{file.stem}_"
    assert capsys.readouterr().err == ""  # no old names


@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_config_reads_back_equal(recipe: str, tmp_path: Path) -> None:
    config = parse([*HERE, "--recipe", recipe, *needed(recipe), "--seed", "5", "--epochs", "1e-5"])
    assert parse(["--config", written(tmp_path, as_yaml(config))]) == config
    shipped = parse(["--config", str(CONFIGS[0]), *HERE, "--seed", "5"])
    assert parse(["--config", written(tmp_path, as_yaml(shipped))]) == shipped


def test_a_second_run_has_what_the_first_has_and_its_own_options(tmp_path: Path) -> None:
    file = "steps: 7\nseed: 3\nlabeled_batch: 9\nalgorithm: {teacher: {lr: 1e-3}}\n"
    file += "then:\n  recipe: finetune\n  epochs: 2\n  labeled_batch: 8\n"
    file += "  algorithm: {learner: {lr: 1e-5}}\n"
    given = ["--config", written(tmp_path, file), *HERE, "--stop-at", "5", "--eval-every", "2"]
    first, second = phases([*given, "--model.pretrained", "f", "--then.log-every=1"])
    assert first == parse([*given, "--model.pretrained", "f"]) and isinstance(second, RunConfig)
    assert isinstance(second.algorithm, FinetuneConfig)
    assert (second.algorithm.start, second.run_dir, second.model.pretrained) == (
        "r", "r/finetune", ""
    )  # fmt: skip
    assert (second.steps, second.epochs, second.stop_at, second.eval_every) == (1000, 2, 0, 5000)
    assert (second.seed, second.labeled_batch, second.log_every) == (3, 8, 1)
    assert second.algorithm.learner == dataclasses.replace(FinetuneConfig().learner, lr=1e-5)
    assert second.data == first.data
    _, second = phases([*given, "--then.steps", "4"])
    assert (second.steps, second.epochs) == (4, 0)
    assert phases([*HERE]) == [parse(HERE)]
    both = phases([*HERE, "--then", "finetune", "--then.seed", "2", "--patience", "3"])
    assert (both[0].patience, both[1].patience) == (3, 0)
    saved = ["--config", written(tmp_path, as_yaml(*both))]
    assert phases(saved) == both
    moved, second = phases([*saved, "--run-dir", "r2", "--device", "cpu"])
    assert isinstance(second.algorithm, FinetuneConfig) and moved.run_dir == "r2"
    assert (second.run_dir, second.algorithm.start, second.device) == ("r2/finetune", "r2", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--then uda", "then must be finetune, not uda"),
        ("--then.steps 5", "then.steps is for a second run: give --then finetune as well"),
        ("--then finetune --then.stepz 5", "unknown option --then.stepz of recipe finetune; did "
         "you mean --then.steps?"),
        ("--then finetune --then.steps x", "then.steps must be a whole number, not x"),
        ("--then finetune --then.steps 0", "then.steps must be at least 1, not 0"),
        ("--then finetune --then.device cpu", "then.device cannot be given: the first run has it"),
        ("--then finetune --then.algorithm.start r2", "then.algorithm.start cannot be given: the "
         "first run has it"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_second_run_ends_the_first_before_it_begins(
    arguments: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        phases([*HERE, *arguments.split()])


LIKE_ANOTHER_TYPE = """\
77950e8 1e-3 2e5 -1E+5 007 0x1f 0o17 0b1 1_0 1:30 .5 5. .inf -.NaN null Null ~ yes No on off TRUE y
= << - ? : # ! & * @ ` % | > [] {} [a] {a:1} 'a' "a" it's ''a\\n a:b a#b a\\b !!int , --- ... \
2026-01-01 2026-01-01T00:00:00Z é 画像 \U0001f4c1 \ud83d\udcc1 \udcff \x00 \ufeff"""
ODD_TEXTS = [
    *LIKE_ANOTHER_TYPE.split(),
    "",
    " ",
    " a",
    "a ",
    "a: b",
    "a #b",
    "\n",
    "a\n",
    "a\n\n b\n",
]
ODD_TEXTS += ["\t", "\r\n", "a\rb", "\x85", "\u2028", "a " * 60, "x" * 300, "a\\ b" * 40]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=()))


def any_value(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, in its range or not."""
    if names := choices(kind):
        return st.sampled_from(names)
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(plain) is tuple:
        first, *others = get_args(plain)
        if others[-1] is Ellipsis:
            return st.lists(any_value(first), max_size=3).map(tuple)
        return st.tuples(*map(any_value, (first, *others)))
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        str: TEXTS,
        int: st.integers(),
        bool: st.booleans(),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }
    return by_type[plain]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_saved_config_of_any_values_reads_back_equal(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --config, and by a plain reader of YAML; no text is a number of YAML 1.2."""
    monkeypatch.setattr("mpl_fast.config.command_line.problems", lambda _: [])
    default = RunConfig(algorithm=RECIPES[recipe]())
    kinds = {option.key: any_value(option.kind) for option in all_options(default)}
    texts = [option.key for option in all_options(default) if option.kind is str]

    def check(values: dict[str, Any]) -> None:
        config, file = replaced(default, values), tmp_path / "config.yaml"
        atomic.write_text(file, as_yaml(config))
        assert repr(parse(["--config", str(file)])) == repr(config)
        plain = yaml.safe_load(file.read_text())
        assert (plain["run_dir"], plain["data"]["root"]) == (config.run_dir, config.data.root)
        assert not re.search(
            r"^run_dir: -?[0-9.]+(e[-+]?\d+)?$", file.read_text(), re.MULTILINE | re.I
        )

    own = any(key.startswith("algorithm.") for key in texts)  # the other texts all recipes share
    for text in ODD_TEXTS if own or recipe == "mpl" else ODD_TEXTS[:1]:
        check(dict.fromkeys(texts, text))
    given(st.fixed_dictionaries(kinds))(check)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stepz", "3"], "unknown option --stepz of recipe mpl; did you mean --steps?"),
        (["--rundir", "x"], "did you mean --run-dir?"),
        (["--lr", "3"], "did you mean --algorithm.teacher.lr?"),
        (["--data.magnitud=3"], "did you mean --data.magnitude?"),
        (["--data", "3"], "unknown option --data of recipe mpl, which is a section: give --data."),
        (["-x"], "unknown option -x"),
        (["stray"], "unknown option stray: options begin with --"),
        (["--steps", "many"], "steps must be a whole number, not many"),
        (["--steps", "1.5"], "steps must be a whole number, not 1.5"),
        (["--epochs", "nan"], "epochs must be a number, not nan"),
        (["--data.crop", "cifr"], "data.crop must be random_resized or pad_crop, not cifr"),
        (["--data.mean", "[1,2]"], "data.mean must be a list such as [1,2,3], not [1,2]"),
        (["--data.flip", "maybe"], "data.flip must be true or false, not maybe"),
        (["--recipe", "mlp"], "recipe 'mlp' does not exist; did you mean mpl?"),
        (["--recipe"], "--recipe needs a value"),
        (["--steps", "--seed", "3"], "--steps needs a value"),
        (["--help=yes"], "--help takes no value"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--config=a.yaml", "--config=b.yaml"], "--config is given twice"),
        (["--algorithm.feedback", "exat"], "algorithm.feedback must be off, difference,"),
        (
            ["--algorithm.teacher.schedule=cos"],
            "algorithm.teacher.schedule must be cosine, constant, step, exponential or onecycle",
        ),
        (["--steps=3", "--epochs=2"], "--steps and --epochs set the same length: give one"),
        (
            ["--eval-every=3", "--eval-epochs=2"],
            "--eval_every and --eval_epochs set the same length: give one",
        ),
        (["--gradients=flat", "--grad-sync=ddp"], "gradients and grad_sync are one option"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_option_is_one_clear_line(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse([*HERE, *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("steps: 3\ndata:\n  magnitud: 3\n", "c.yaml:3: unknown key data.magnitud of recipe mpl; "),
        ("data:\n  magnitud: 3\n", "did you mean data.magnitude?"),
        ("recipe: uda\nalgorithm: {student: {lr: 1}}\n", "c.yaml:2: unknown key algorithm.student"),
        ("data: 3\n", "c.yaml:1: unknown key data of recipe mpl, which is a section: give data."),
        ("steps: {a: 3}\n", "c.yaml:1: unknown key steps.a of recipe mpl"),
        ("steps: [3\n", "c.yaml is not YAML"),
        ("- 3\n", "must hold keys and values"),
        ("# nothing\n", "c.yaml is empty"),
        ("data: {mean: 0.5}\n", "c.yaml:1: data.mean must be a list such as [1,2,3], not 0.5"),
        ("steps: 3.5\n", "c.yaml:1: steps must be a whole number, not 3.5"),
        ("steps: [3]\n", "c.yaml:1: steps must be a whole number, not [3]"),
        (
            "seed: 1\ndata:\n  crop: cifr\n",
            "c.yaml:3: data.crop must be random_resized or pad_crop",
        ),
        ("recipe: [1]\n", "recipe"),
        ("steps: 3\ndata:\n", "c.yaml:2: data has no value"),
        ("steps: 3\nfoo: {}\n", "c.yaml:2: foo has no value"),
        ("steps: 3\nseed: 1\nsteps: 4\n", "c.yaml:3: steps is given here for the second time"),
        (
            "data.crop: pad_crop\ndata:\n  crop: random_resized\n",
            "c.yaml:3: data.crop is given here for the second time",
        ),
        (
            "algorithm:\n  smoothing: 0\n  label_smoothing: 0\n",
            "c.yaml:2: algorithm.smoothing and algorithm.label_smoothing are one option",
        ),
    ],
)
def test_a_mistake_in_yaml_names_the_line(yaml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse(["--config", written(tmp_path, yaml), *HERE])
    assert "\n" not in str(caught.value)


OLD = """gradients: flat
data: {weak: cifar, layers: 1}
algorithm:
  smoothing: 0.2
  teacher: {clip: 1, wait: 3}
  student: {clip: 2}
"""
OLD_NAMES = (
    "gradients is now grad_sync, grad_sync flat is now allreduce, weak is now crop, crop cifar is "
    "now pad_crop, layers is now num_ops, smoothing is now label_smoothing, clip is now "
    "max_grad_norm, wait is now delay_steps\n"
)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_old_names_are_read_from_a_file_with_one_warning(
    rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    file = written(tmp_path, OLD)
    config = parse(["--config", file, *HERE])
    printed = capsys.readouterr().err
    assert printed == (f"warning: {file} uses old option names: {OLD_NAMES}" if rank == "0" else "")
    assert isinstance(config.algorithm, MPLConfig)
    teacher, student = config.algorithm.teacher, config.algorithm.student
    assert (config.grad_sync, config.data.crop, config.data.num_ops) == ("allreduce", "pad_crop", 1)
    assert (teacher.max_grad_norm, teacher.delay_steps, student.max_grad_norm) == (1, 3, 2)
    assert config.algorithm.label_smoothing == 0.2


def test_old_names_are_read_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They override a file as the present names do."""
    file = written(tmp_path, "grad_sync: ddp\ndata: {crop: random_resized}\n")
    typed = ["--gradients", "flat", "--algorithm.student.wait=4", "--data.weak=cifar"]
    config = parse(["--config", file, *HERE, *typed])
    assert (config.grad_sync, config.data.crop) == ("allreduce", "pad_crop")
    assert isinstance(config.algorithm, MPLConfig) and config.algorithm.student.delay_steps == 4
    assert capsys.readouterr().err == (
        "warning: the command line uses old option names: gradients is now grad_sync, grad_sync "
        "flat is now allreduce, wait is now delay_steps, weak is now crop, crop cifar is now "
        "pad_crop\n"
    )
    roles = parse([*HERE, "--recipe=mpl_roleplay", "--algorithm.student-wait=2"])
    assert dataclasses.asdict(roles.algorithm)["student_delay_steps"] == 2


def test_contradictions_of_the_algorithm_matter_in_training_only(tmp_path: Path) -> None:
    file = written(tmp_path, "recipe: finetune\ndata: {image_size: 32}\n")
    with pytest.raises(ConfigError, match="start is missing"):
        parse(["--config", file, *HERE])
    assert parse(["--config", file, *HERE], for_training=False).data.image_size == 32
    with pytest.raises(ConfigError, match=r"data\.num_ops"):
        parse(["--config", file, *HERE, "--data.num_ops=-1"], for_training=False)


def test_steps_on_the_command_line_override_epochs_of_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "epochs: 9\neval_epochs: 2\n")
    assert parse(["--config", file, *HERE]).epochs == 9
    short = parse(["--config", file, *HERE, "--steps", "10", "--eval-every", "5"])
    assert (short.steps, short.epochs, short.eval_every, short.eval_epochs) == (10, 0, 5, 0)
    longer = parse(["--config", file, *HERE, "--epochs", "20"])
    assert (longer.epochs, longer.eval_epochs) == (20, 2)


def test_print_config_prints_the_merged_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "recipe: uda\nsteps: 10\n")
    with pytest.raises(SystemExit) as ended:
        parse(["--config", file, "--seed", "4", "--print-config"])  # folders may be missing
    assert ended.value.code == 0
    printed = written(tmp_path, capsys.readouterr().out)
    expected = parse(["--recipe=uda", "--steps=10", "--seed=4", *HERE])
    assert parse(["--config", printed, *HERE]) == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_explains_every_option_of_a_recipe(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inherited ones too: a name, and words before its range and default."""
    with pytest.raises(SystemExit) as ended:
        parse(["--recipe", recipe, "--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    keys = [option.key for option in all_options(RunConfig(algorithm=RECIPES[recipe]()))]
    for key in ["recipe", *keys]:
        name = re.escape(f"--{key} ")
        assert re.search(rf"{name}\S+ [A-Za-z0-9.]\w*\W.{{3,}}?\([^()]*default: ", printed), key


def test_help_shows_choices_ranges_and_the_defaults_of_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["-h"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--algorithm.teacher.schedule {cosine,constant,step,exponential,onecycle} " in printed
    assert re.search(r"--algorithm\.teacher\.lr FLOAT [^(]*\(at least 0; default: 0\.6\)", printed)
    assert re.search(r"--data\.mean \[FLOAT,\.\.\.\] .*?\(at least 0; default: \[0\.485,0", printed)
    assert re.search(r"--data\.flip \{true,false\} [^(]*\(default: true\)", printed)


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
