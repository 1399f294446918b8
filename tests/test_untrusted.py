"""Text and names from files are data: bounded, never executed, never outside their folder."""

import ast
import sys
from functools import partial
from pathlib import Path

import pytest

from mpl_fast.config.command_line import yaml_file
from mpl_fast.errors import ConfigError
from mpl_fast.untrusted import YAML_BYTES, file_in, json_value, yaml_node, yaml_value

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted(ROOT.glob("mpl_fast/**/*.py")), *sorted(ROOT.glob("tools/**/*.py"))]
DOUBLED = ["x0: &a0 {k: 1}", *(f"x{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 40))]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a/b", "a\0b", None, 3, ["a"]]
)
def test_a_name_leads_nowhere_else(name: object) -> None:
    with pytest.raises(ValueError, match="is not the name of a file in this folder"):
        file_in(Path("folder"), name)


@pytest.mark.parametrize("name", ["train.rec", "...", " ", "a\\..\\b", "é\udcff"])
def test_other_names_stay_in_the_folder(name: str) -> None:
    assert file_in(Path("folder"), name) == Path("folder", name)


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_deep_json_is_a_wrong_value(opened: str) -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        json_value(opened * 100_000)
    assert json_value("[1, {}]") == [1, {}]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: " + "[" * 700, ": nested too deep"),
        ("a: " + "{b: " * 700, ": nested too deep"),
        ("\n".join(DOUBLED), "more than 10000 values, with those of aliases"),
        ("&a {b: *a}", "more than 10000 values"),
        ("a: &b [*b]", "more than 10000 values"),
        ("a: 1\nb: !!python/object/apply:os.system [id]", ":2: the tag tag:yaml.org,2002:python/"),
        ("a: !x 3", ":1: the tag !x is not read: remove it"),
        ("a: !!binary aGk=", ":1: the tag tag:yaml.org,2002:binary"),
        ("a: " + "b" * YAML_BYTES, f"more than {YAML_BYTES} bytes are no config"),
        ("a: \x07", "is not YAML: unacceptable character"),
        ("a: [1", "is not YAML: while parsing"),
    ],
)
def test_yaml_that_is_refused(
    text: str, line: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the config of a command and in that of a run directory alike."""
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # as Python begins; other tests raise it
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for read in (yaml_node, yaml_value):
        with pytest.raises(ValueError) as refused:
            read(file)
        assert str(refused.value).startswith(str(file)) and line in str(refused.value)
    with pytest.raises(ConfigError) as error:
        yaml_file(str(file))
    assert str(error.value) == str(refused.value) and "\n" not in str(error.value)


def test_yaml_that_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: &l {lr: 1e-3, ema: true}\nb: *l\nc: [1, x]\n", encoding="utf-8-sig")
    one = {"lr": "1e-3", "ema": True}
    assert yaml_value(file) == {"a": one, "b": one, "c": [1, "x"]}
    assert {key: given.text for key, given in yaml_file(str(file)).items()} == {
        **{"a.lr": "1e-3", "a.ema": "true", "b.lr": "1e-3", "b.ema": "true"},
        "c": ["1", "x"],
    }
    file.write_text("a: " + "9" * 5000)
    with pytest.raises(ValueError, match="is not YAML: Exceeds the limit"):
        yaml_value(file)


# Calls that execute what they are given, or unpickle it unless an argument forbids that.
FORBIDDEN = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "pd.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load",
    "shutil.unpack_archive", "json.load", "json.loads", "np.load", "numpy.load",
}  # fmt: skip
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# What is no data, but was made a moment ago; and the readers of all else, which name any damage.
OWN_TEXT = ("yaml.safe_load(as_yaml(", "json.loads(json.dumps(", "json.loads(distribution_to_json(")
READERS = "mpl_fast/untrusted.py"


def test_nothing_that_is_read_is_executed() -> None:
    """All calls of all sources; pickles are read by one class, which calls nothing they name, and
    JSON, YAML and arrays by functions of one file, whose errors are all of one kind."""
    seen, wrong = set(), []
    words = {name.rpartition(".")[2] for name in FORBIDDEN | NEEDED.keys()}
    words |= {"extract", "Unpickler", "shell", "safe_load"}
    for path in SOURCES:
        text = path.read_text()
        if not any(word in text for word in words):
            continue  # parsing takes seconds
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(
                ast.unparse, node.bases
            ):
                seen.add(path.name)
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
            seen.add(name)
            shell = given.get("shell")
            own = ast.unparse(node).startswith(OWN_TEXT) or where.startswith(READERS)
            forbidden = name in FORBIDDEN or name == "yaml.safe_load"
            wrong += [where] * (forbidden and not own)
            wrong += [where] * name.endswith((".extractall", ".extract"))
            wrong += [where] * (shell is not None and ast.unparse(shell) != "False")
            if name in NEEDED:
                key, value = NEEDED[name]
                wrong += [where] * (key not in given or ast.unparse(given[key]) != str(value))
    assert not wrong
    # A checker that finds nothing would pass everything.
    assert {"torch.load", "np.load", "json.loads", "yaml.safe_load", "plain_pickle.py"} <= seen
