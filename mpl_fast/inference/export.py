"""A trained network as a file for other programs: safetensors, torch.export or ONNX."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mpl_fast import atomic, models
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.inference.model_card import TAG, card, hub_config
from mpl_fast.inference.trained import Ensemble, Trained
from mpl_fast.models.weights_file import reason

CONFIG, CARD = "config.json", "README.md"
WEIGHTS = "model.safetensors"  # by this name timm and the Hugging Face hub find them
OPSET = 18  # of ONNX: the one that PyTorch's operators are written in, which needs no conversion
ONNX_LIMIT = 1_900_000_000  # bytes of weights in an ONNX file, which must be smaller than 2 GiB
TRACED, CHECKED = 2, 3  # images in a batch

Logits = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """A kind of file; functions of the run, its network, and the file."""

    write: Callable[[Trained, nn.Module, Path, str], None]  # str: the text of config.json
    read: Callable[[Trained, Path], Logits | None]  # None: a package that runs it is missing
    tolerance: float  # of logits, as a share of the largest


class Exported(NamedTuple):
    """What `export` wrote."""

    files: list[Path]
    difference: float | None  # of logits, as a share of the largest; None: not checked
    notes: list[str]


def export(trained: Trained, out: Path, *, force: bool = False) -> Exported:
    """Writes a network to `out`, and config.json and README.md, a model card, beside it.

    The suffix of `out` is one of `FORMATS`. The network takes ``(N, 3, H, W)`` float32 normalized
    images, for any N, and returns ``(N, C)`` logits. Before the file gets its name it is read
    again, and its logits of random images are compared. `force` replaces files of an earlier
    export. Raises `ConfigError` for a suffix or a network that cannot be exported, and
    `OutputError` for files that exist, cannot be written, or give other logits.
    """
    form = check_out(out, force=force)
    try:
        manifest, notes = read_manifest(trained.config.data.root), []
    except DataError:
        manifest, notes = None, ["the run's records cannot be read: the card has no image counts"]
    texts = _texts(trained, manifest, out, force=force)
    if CARD not in texts:
        notes.append(f"{out.with_name(CARD)} has been edited and stays as it is")
    network = copy.deepcopy(trained.network).cpu()
    network = cast(Any, network).to(memory_format=torch.contiguous_format)
    with output_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export_", dir=out.parent) as folder:
            new = Path(folder) / out.name
            for name, text in texts.items():
                atomic.write_text(new.with_name(name), text)
            form.write(trained, network, new, texts[CONFIG])
            difference = _difference(network, form.read(trained, new), trained)
            if difference is not None and not difference <= form.tolerance:
                raise OutputError(
                    f"{out} is not written: its logits of random images differ from the run's by "
                    f"{difference:.1e} of the largest, and {form.tolerance:.0e} is allowed"
                )
            names = sorted(file.name for file in new.parent.iterdir())
            for name in names:
                with atomic.atomic_path(out.with_name(name), new.with_name(name)):
                    pass
        here = [file for file in out.parent.iterdir() if file.suffix not in FORMATS]
    if others := sorted({file.name for file in here} - {*names, CONFIG, CARD}):
        notes.append(
            f"{out.parent} has other files, which an upload would publish: {first_few(others, 3)}"
        )
    return Exported([out.with_name(name) for name in names], difference, notes)


def check_out(out: Path, *, force: bool = False) -> Format:
    """The format of a file to write. Raises `ConfigError` for an unknown one, or one whose packages
    are missing, and `OutputError` for a file that exists and a folder."""
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out {out}: the name must end in {', '.join(FORMATS)}")
    if out.suffix == ".safetensors" and out.name != WEIGHTS:
        raise ConfigError(f"--out {out}: weights are found by the name {WEIGHTS} only")
    if out.suffix == ".onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ConfigError(f"--out {out}: needs onnx and onnxscript: pip install 'mpl_fast[export]'")
    with output_errors(out):
        if out.is_dir():
            raise OutputError(f"--out {out} is a folder: name a file")
        if out.exists() and not force:
            raise OutputError(f"--out {out} exists: give another name, or --force to replace it")
    return FORMATS[out.suffix]


def _texts(
    trained: Trained, manifest: Manifest | None, out: Path, *, force: bool
) -> dict[str, str]:
    """Texts of config.json and README.md; without a README.md that somebody has edited. Raises
    `OutputError` for a config.json that must not be replaced."""
    config, readme = out.with_name(CONFIG), out.with_name(CARD)
    text = hub_config(trained, manifest)
    before = sorted(file.name for file in out.parent.glob("*") if file.suffix in FORMATS)
    after = sorted({*before, out.name})
    with output_errors(out):
        if config.exists() and (old := _text(config)) != text:
            if f'"{TAG}"' not in old:
                raise OutputError(f"{config} is not of an export: name a file in another folder")
            if not force:
                raise OutputError(
                    f"{config} is of another export: name a file in another folder, or --force to "
                    "replace it"
                )
        texts = {CONFIG: text, CARD: card(trained, manifest, after)}
        if readme.exists():
            old = _text(readme)
            ours = old in (texts[CARD], card(trained, manifest, before))
            ours = ours or (force and f"- {TAG}\n" in old)
            if not ours:
                del texts[CARD]
    return texts


def _text(file: Path) -> str:
    return file.read_text("utf-8", "surrogateescape")


def _difference(network: nn.Module, again: Logits | None, trained: Trained) -> float | None:
    """The largest difference of logits of random images, as a share of the largest logit."""
    if again is None:
        return None
    side = trained.config.data.image_size
    images = torch.randn(CHECKED, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = network(images), again(images)
    return float((found - expected).abs().max() / expected.abs().max())


def _write_weights(trained: Trained, network: nn.Module, file: Path, about: str) -> None:
    from safetensors.torch import save  # comes with timm

    if isinstance(network, Ensemble):
        raise ConfigError(
            f"--out {file.name}: the run's result is an ensemble of {len(network.members)} "
            "networks, and this file holds the weights of one: name a .pt2 or .onnx file"
        )
    tensors = {  # cloned: two names of one tensor are refused
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in network.state_dict().items()
    }
    atomic.write_bytes(file, save(tensors, {"format": "pt", CONFIG: about}))


def _read_weights(trained: Trained, file: Path) -> Logits:
    """As users do: timm's networks without this package."""
    name = trained.config.model.name
    if models.in_timm(name):
        import timm  # late: takes a second

        loaded = timm.create_model(f"local-dir:{file.parent}", pretrained=True)
    else:
        from safetensors.torch import load_file

        loaded = models.build(name, len(trained.classes))
        loaded.load_state_dict(load_file(file))
    return cast(Logits, loaded.eval())


def _trace(trained: Trained, network: nn.Module) -> torch.export.ExportedProgram:
    side = trained.config.data.image_size
    images = torch.zeros(TRACED, 3, side, side)
    with _traced(trained):
        return torch.export.export(network, (images,), dynamic_shapes=_batch())


def _batch() -> tuple[dict[int, Any]]:
    """The dimensions of the one input that may differ from those traced."""
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _traced(trained: Trained) -> Iterator[None]:
    """Turns what PyTorch raises for a network that it cannot trace into a `ConfigError`."""
    try:
        yield
    except Exception as error:  # many kinds
        raise ConfigError(
            f"model.name {trained.config.model.name} cannot be exported to this format "
            f"({reason(error)}): name a .safetensors file"
        ) from error


def _write_program(trained: Trained, network: nn.Module, file: Path, about: str) -> None:
    content = io.BytesIO()
    torch.export.save(_trace(trained, network), content, extra_files={CONFIG: about})
    atomic.write_bytes(file, content.getvalue())


def _read_program(trained: Trained, file: Path) -> Logits:
    return cast(Logits, torch.export.load(file).module())


def _write_onnx(trained: Trained, network: nn.Module, file: Path, about: str) -> None:
    traced = _trace(trained, network)
    side = trained.config.data.image_size
    with _traced(trained):
        program = torch.onnx.export(
            traced,
            (torch.zeros(TRACED, 3, side, side),),
            dynamo=True,
            dynamic_shapes=_batch(),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[CONFIG] = about
    size = sum(value.nbytes for value in network.state_dict().values())
    program.save(file, external_data=size > ONNX_LIMIT)


def _read_onnx(trained: Trained, file: Path) -> Logits | None:
    if not find_spec("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS = {
    ".safetensors": Format(_write_weights, _read_weights, 0.0),
    ".pt2": Format(_write_program, _read_program, 1e-5),
    ".onnx": Format(_write_onnx, _read_onnx, 1e-4),
}
