"""The runs of an ablation: variants of one config, each with every seed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mpl_fast.atomic import write_text
from mpl_fast.config import RECIPES, RunConfig
from mpl_fast.config.command_line import as_yaml, parse
from mpl_fast.errors import ConfigError
from mpl_fast.training.curves import read_summary

Json = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A name, and the options of train.py as ``key=value`` in which it differs from the config."""

    name: str
    settings: tuple[str, ...]
    against: str = ""
    """A variant that it is compared with, besides the first one."""


# The feedbacks, and for reference their teacher's losses without a student and without unlabeled
# images. Feedback exact has soft labels, so it differs from off in two things.
DEFAULTS = (
    Variant("off", ("algorithm.feedback=off",)),
    Variant("difference", ("algorithm.feedback=difference",)),
    Variant("off_soft", ("algorithm.feedback=off", "algorithm.labels=soft")),
    Variant("exact", ("algorithm.feedback=exact",), against="off_soft"),
    Variant("labeled_only", ("recipe=supervised",)),
    Variant("uda", ("recipe=uda",)),
)


@dataclass(frozen=True)
class Job:
    """One run: a variant with a seed."""

    variant: Variant
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of train.py
    config: RunConfig

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def complete(self) -> bool:
        """Whether its folder holds this very run to its end."""
        from mpl_fast.training.same_config import changes_since  # imports PyTorch

        try:
            changes = changes_since(self.folder / "config.yaml", self.config)
        except ConfigError:
            return False  # train.py reports what is wrong, or resumes
        return not changes and read_summary(self.folder).get("steps") == self.config.steps


def jobs(
    variants: tuple[Variant, ...], seeds: list[int], config: Path, rec: Path, out: Path, steps: int
) -> list[Job]:
    """All runs, seed by seed, so that an ablation cut short still has pairs.

    Writes a config into `out` for each variant of another recipe. Raises `ConfigError` for a
    variant that train.py would refuse, or that sets what an option of the ablation sets.
    """
    for variant in variants:
        _refuse_common(variant, steps)
    common = ["--data.root", str(rec), *(["--steps", str(steps)] if steps else [])]
    files = {v.name: _config_file(v, config, common, out) for v in variants}
    return [
        _job(variant, seed, ["--config", str(files[variant.name]), *common], out)
        for seed in seeds
        for variant in variants
    ]


def _job(variant: Variant, seed: int, arguments: list[str], out: Path) -> Job:
    folder = out / variant.name / f"seed{seed}"
    own = [f"--{s}" for s in variant.settings if not s.startswith("recipe=")]
    whole = [*arguments, *own, "--run-dir", str(folder), "--seed", str(seed)]
    return Job(variant, seed, folder, tuple(whole), _parsed(variant, whole))


def _refuse_common(variant: Variant, steps: int) -> None:
    """Without these, seeds would no longer pair the runs, nor variants share records."""
    options = {"seed": "--seeds", "run_dir": "--out", "data.root": "--rec", "config": "--config"}
    if steps:
        options["steps"] = "--steps"
    for setting in variant.settings:
        key = setting.partition("=")[0]
        if option := options.get(key.replace("-", "_")):
            raise ConfigError(f"variant {variant.name}: {key} is set by {option}")


def _parsed(variant: Variant, arguments: list[str]) -> RunConfig:
    try:
        return parse(arguments)
    except ConfigError as error:
        raise ConfigError(f"variant {variant.name}: {error}") from None


def _config_file(variant: Variant, config: Path, common: list[str], out: Path) -> Path:
    """The given config, or one of another recipe with as much of it as that recipe has."""
    recipes = [s.partition("=")[2] for s in variant.settings if s.startswith("recipe=")]
    base = _parsed(variant, ["--config", str(config), *common, "--run-dir", str(out)])
    if not recipes or recipes[-1] == base.recipe:
        return config
    if recipes[-1] not in RECIPES:
        raise ConfigError(f"variant {variant.name}: recipe {recipes[-1]!r} does not exist")
    tree = yaml.safe_load(as_yaml(base))
    tree["algorithm"] = _carried_over(tree["algorithm"], recipes[-1])
    tree["recipe"] = recipes[-1]
    del tree["run_dir"]
    file = out / "configs" / f"{variant.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(tree, sort_keys=False))
    return file


def _carried_over(algorithm: Json, recipe: str) -> Json:
    """The settings that `recipe` has too; a single network is trained as the teacher was, and
    averaged, as the student was, for evaluation."""
    settings = dict(algorithm)
    if "teacher" in algorithm:
        settings["learner"] = algorithm["teacher"] | {"ema": algorithm["student"]["ema"]}
    elif "learner" in algorithm:
        settings["teacher"] = settings["student"] = algorithm["learner"]
    names = [field.name for field in dataclasses.fields(RECIPES[recipe])]
    return {name: settings[name] for name in names if name in settings}
