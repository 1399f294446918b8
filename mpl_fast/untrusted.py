"""Text and names from files that anyone may have written: read as data, in bounded time.

All errors are ValueError, so that a reader has one kind of damage to name.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

YAML_BYTES = 1 << 18  # PyYAML reads about 100 KB a second; no config has as many
YAML_VALUES = 10_000  # an alias counts as all that it stands for
_KINDS = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value")
YAML_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}


def file_in(folder: Path, name: Any) -> Path:
    """The file of this name in a folder. Raises ValueError for a path that leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in this folder")
    return folder / name


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing, damaged, or holds something else."""
    try:
        return _object(json_value(file.read_bytes()))
    except (OSError, ValueError):
        return {}


def yaml_object(file: Path) -> dict[str, Any]:
    """The same of a YAML file."""
    try:
        return _object(yaml_value(file))
    except (OSError, ValueError):
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def npz_arrays(file: Path) -> dict[str, Any]:
    """The arrays of an uncompressed .npz file by name. Raises OSError, too."""
    import numpy as np  # late: --help must not wait for it

    try:
        with np.load(file, allow_pickle=False) as stored:
            if sum(part.file_size for part in stored.zip.infolist()) > file.stat().st_size:
                raise ValueError("it is compressed")
            return {name: stored[name] for name in stored.files}
    except OSError:
        raise
    except Exception as error:  # the reader can raise anything
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def yaml_node(file: Path) -> "yaml.Node | None":
    """The tree of a YAML file; None if it is empty. Raises OSError, too.

    Refused are tags (all that makes objects of other types), more than `YAML_BYTES` or
    `YAML_VALUES`, and aliases of what contains them.
    """
    import yaml  # late: 20 ms

    with file.open("rb") as stream:
        content = stream.read(YAML_BYTES + 1)
    if len(content) > YAML_BYTES:
        raise ValueError(f"{file}: more than {YAML_BYTES} bytes are no config")
    try:
        loader = yaml.SafeLoader(content.decode("utf-8-sig"))
        loader.name = str(file)  # errors name it, with line and column
        tree = loader.get_single_node()
    except RecursionError:
        raise ValueError(f"{file}: nested too deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    waiting, count = [tree] if tree else [], 0
    while waiting:
        node = waiting.pop()
        count += 1
        where = f"{file}:{node.start_mark.line + 1}"
        if count > YAML_VALUES:
            raise ValueError(f"{where}: more than {YAML_VALUES} values, with those of aliases")
        if node.tag not in YAML_TAGS:
            raise ValueError(f"{where}: the tag {node.tag} is not read: remove it")
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return tree


def yaml_value(file: Path) -> Any:
    """The value of a YAML file, with the limits of `yaml_node`."""
    import yaml

    tree = yaml_node(file)
    try:
        return yaml.constructor.SafeConstructor().construct_document(tree) if tree else None
    except (yaml.YAMLError, OverflowError, ValueError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
