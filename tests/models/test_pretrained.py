"""Weights to begin with are those of the file, and a frozen trunk stays what it was."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.errors import ConfigError

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str, classes: int) -> nn.Module:
    """A network whose every tensor differs from a fresh one's."""
    torch.manual_seed(9)
    network = models.build(name, classes)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)  # counters become 0 or 1
    return network


def write(file: Path, content: Any) -> str:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return str(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("name", ["wrn_10_1", "shake_shake_8_8", "test_resnet"])
def test_every_tensor_is_loaded(name: str, suffix: str, tmp_path: Path) -> None:
    source = trained(name, 10).state_dict()
    network = models.build(name, 10, pretrained=write(tmp_path / f"w{suffix}", source))
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.items())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ["wrn_10_1", "convlarge", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("present", [True, False], ids=["other classes", "no head"])
def test_a_head_that_does_not_fit_stays_fresh(name: str, present: bool, tmp_path: Path) -> None:
    source = trained(name, 10).state_dict()
    heads = ("head.", "fc.") if name != "test_convnext" else ("head.fc.",)
    if not present:
        source = {key: value for key, value in source.items() if not key.startswith(heads)}
    file = write(tmp_path / "w.safetensors", source)
    torch.manual_seed(4)
    fresh = models.build(name, 7).state_dict()
    torch.manual_seed(4)
    loaded = models.build(name, 7, pretrained=file).state_dict()
    head = [key for key in loaded if key.startswith(heads)]
    assert len(head) == 2
    for key, value in loaded.items():
        assert torch.equal(value, fresh[key] if key in head else source[key]), key


def test_counters_may_be_absent(tmp_path: Path) -> None:
    source = trained("wrn_10_1", 10).state_dict()
    kept = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    loaded = models.build("wrn_10_1", 10, pretrained=write(tmp_path / "w.pth", kept)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in kept.items())


HEADS = ["wrn_10_1", "test_vit", "repvit_m0_9"]  # of the last one: two below another module


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_put_into_the_order_of_the_classes(name: str, tmp_path: Path) -> None:
    """With as many classes as channels: only rows of classes move."""
    source, classes = trained(name, 64), [*map(str, range(64))]
    with torch.no_grad():  # sane magnitudes
        for value in source.parameters():
            value.sub_(1.0)
    learner = {"network": source.state_dict(), "average": None}
    content = {"learners": {"one": learner}, "classes": classes}
    file, notes = write(tmp_path / "state.pt", content), list[str]()
    turned = [*classes[1:], classes[0]]
    network = models.build(name, 64, pretrained=file, class_names=turned, notes=notes)
    assert notes == [
        f"begins with the weights of {file} (its one); the last layer is taken, its classes by "
        "name: the file has another order"
    ]
    side = 160 if name == "test_vit" else 32
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source.eval()(images)
        assert expected.std(dim=1).min() > 0
        assert torch.equal(network.eval()(images), expected.roll(-1, dims=1))


@pytest.mark.parametrize(
    ("classes", "about"),
    [
        ([*"abc"], "is taken"),
        ([*"abd"], "is new: the file's has other classes (only trained: c; only here: d)"),
        ([*"ab"], "is new: the file's has another shape"),
    ],
)
def test_a_head_of_other_classes_stays_fresh(
    classes: list[str], about: str, tmp_path: Path
) -> None:
    source = trained("wrn_10_1", 3).state_dict()
    learners = {"one": {"network": source, "average": None}}
    file = write(tmp_path / "w.pt", {"learners": learners, "classes": [*"abc"]})
    notes: list[str] = []
    network = models.build(
        "wrn_10_1", len(classes), pretrained=file, class_names=classes, notes=notes
    )
    assert notes[0].endswith(f"; the last layer {about}")
    head = network.get_parameter("head.weight")
    loaded = head.shape[0] == 3 and torch.equal(head, source["head.weight"])
    assert loaded == (about == "is taken")
    write(tmp_path / "w.pt", source)
    models.build("wrn_10_1", 3, pretrained=file, class_names=classes, notes=notes)
    assert notes[1].endswith("is taken, classes in its order: the file has no class names")


def test_files_that_do_not_fit_or_are_damaged_are_one_clear_line(tmp_path: Path) -> None:
    source = trained("wrn_10_1", 10).state_dict()
    without = {key: value for key, value in source.items() if not key.startswith("stem")}
    cases: dict[str, tuple[Any, str]] = {
        "lack.pth": (without, r"it lacks stem\.weight; give"),
        "more.pth": (source | {"extra": torch.zeros(1)}, "it has besides extra; give"),
        "shape.safetensors": (
            source | {"stem.weight": torch.zeros(16, 1, 3, 3)},
            r"it has in another shape stem\.weight \(16, 1, 3, 3\) for \(16, 3, 3, 3\); give",
        ),
        "other.pth": (
            trained("convlarge", 10).state_dict(),
            r"lacks stem\.weight, blocks\.0\.norm1\.weight, .* and \d+ more; has besides features",
        ),
        "list.pth": ([torch.zeros(1)], r"has no state dict \(list\)"),
        "module.pth": (models.build("wrn_10_1", 10), r"needs mpl_fast\.models\.wide_resnet\.Wide"),
    }
    weight = source["stem.weight"]
    kinds = {"sparse": weight.to_sparse(), "meta": weight.to("meta"), "int8": weight.to(torch.int8)}
    kinds |= {"complex": weight.to(torch.complex64)}
    message = r"it has not as dense real numbers stem\.weight; give a file"
    cases |= {f"{kind}.pth": (source | {"stem.weight": w}, message) for kind, w in kinds.items()}
    files = {write(tmp_path / name, content): message for name, (content, message) in cases.items()}
    for name in ("cut.pth", "cut.safetensors"):
        file = write(tmp_path / name, source)
        Path(file).write_bytes(Path(file).read_bytes()[:1000])
        files[file] = r"cannot be read \(.*; give a \.saf"
    for file, message in files.items():
        name = Path(file).name
        with pytest.raises(ConfigError, match=rf"^model\.pretrained: .*{name}.*{message}") as error:
            models.build("wrn_10_1", 10, pretrained=file)
        assert "\n" not in str(error.value)
    for absent in (str(tmp_path / "absent.pth"), "https://host/w.pth", "C:\\w.pth:ema"):
        words = f"there is no file {re.escape(absent)}; give a file, 'timm'"
        with pytest.raises(ConfigError, match=words):
            models.build("wrn_10_1", 10, pretrained=absent)


@pytest.mark.parametrize(
    ("name", "sizes", "shapes"),
    [
        ("test_vit", (160, 32), r"pos_embed \(1, 101, 64\) for \(1, 5, 64\)"),
        ("levit_128", (224, 64), r"stages\.0\.blocks\.0\.attn\.attention_biases .* and \d+ more"),
    ],
)
def test_position_embeddings_of_another_image_size_are_called_so(
    name: str, sizes: tuple[int, int], shapes: str, tmp_path: Path
) -> None:
    """And those of another network beside are not."""
    there, here = sizes
    source = models.build(name, 3, image_size=there).state_dict()
    head = r"^model\.pretrained: .* does not fit "
    file = write(tmp_path / "w.pth", source)
    with pytest.raises(
        ConfigError, match=f"{head}data.image_size: it .*{shapes}; the file is for images"
    ):
        models.build(name, 3, image_size=here, pretrained=file)
    weight = next(key for key, value in source.items() if value.ndim == 4)
    write(tmp_path / "w.pth", source | {weight: torch.zeros(1, 1, 1, 1)})
    with pytest.raises(ConfigError, match=f"{head}model.name: .*give a file of the same network$"):
        models.build(name, 3, image_size=here, pretrained=file)


def test_timms_weights_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself is replaced: the tests are run without internet."""
    source = trained("test_resnet", 1000).state_dict()
    hub = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(hub, lambda *_, **__: copy.copy(source))
    notes: list[str] = []
    loaded = models.build("test_resnet", 7, pretrained="timm", notes=notes).state_dict()
    models.build("test_resnet", 1000, pretrained="timm", notes=notes)
    begin = "begins with the weights that timm publishes; the last layer is"
    assert notes == [f"{begin} new: theirs has 1000 classes", f"{begin} taken, in timm's order"]
    assert torch.equal(loaded["conv1.0.weight"], source["conv1.0.weight"])
    assert loaded["fc.weight"].shape[0] == 7
    source = trained("resnet18", 7).state_dict()
    loaded = models.build("resnet18_cifar", 7, pretrained="timm", notes=notes).state_dict()
    assert notes[-1] == f"{begin} new: theirs has 1000 classes; the first convolution is new"
    new = ("conv1.", "fc.")
    assert all(torch.equal(loaded[k], v) for k, v in source.items() if not k.startswith(new))
    assert loaded["conv1.weight"].shape[2:] == (3, 3)


def test_timms_weights_without_internet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"'test_resnet' could not be had .*timm/test_resnet.r160_in1k .*FILE, or .* random",
    ) as e:
        models.build("test_resnet", 7, pretrained="timm")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="timm has no network 'wrn_10_1'; give a local file"):
        models.build("wrn_10_1", 7, pretrained="timm")
    with pytest.raises(ConfigError, match="timm has no weights for 'resnet200'; give a local"):
        models.build("resnet200", 7, pretrained="timm")


FROZEN = ["wrn_10_1", "shake_shake_8_8", "test_resnet", "test_efficientnet"]


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_trunk_stays_what_it_was(name: str) -> None:
    """Through a copy, too; a training step moves the head alone."""
    torch.manual_seed(0)
    original = models.build(name, 5, norm_momentum=0.5, frozen=True)
    network = copy.deepcopy(original).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=0.1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network(IMAGES).square().mean().backward()
    optimizer.step()
    moved = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    head = "fc" if name == "test_resnet" else "classifier" if "eff" in name else "head"
    assert moved == {f"{head}.weight", f"{head}.bias"}
    assert {key for key, p in network.named_parameters() if p.grad is not None} == moved
    assert (
        models.count_parameters(network) == network.get_parameter(f"{head}.weight").shape[1] * 5 + 5
    )
    assert torch.equal(original.state_dict()[f"{head}.weight"], before[f"{head}.weight"])


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_network_computes_the_free_ones_evaluation(name: str, tmp_path: Path) -> None:
    """Activations that timm puts into its norms included; and checkpoints go both ways."""
    free = trained(name, 5)
    with torch.no_grad():  # sane magnitudes
        for value in free.state_dict().values():
            if value.ndim > 1:
                value.sub_(1.0)
    file = write(tmp_path / "w.pth", free.state_dict())
    frozen = models.build(name, 5, pretrained=file, frozen=True)
    free.load_state_dict(frozen.state_dict())
    with torch.no_grad():
        wanted = free.eval()(IMAGES)
        assert torch.isfinite(wanted).all()
        assert torch.equal(frozen.eval()(IMAGES), wanted)
        if name != "shake_shake_8_8":  # whose noise stays
            assert torch.equal(frozen.train()(IMAGES), wanted)


def test_a_frozen_network_passes_through_ddp(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        network = models.build("wrn_10_1", 5, frozen=True).train()
        replica = nn.parallel.DistributedDataParallel(network)
        for _ in range(2):  # the second forward raises if the first left a parameter waiting
            replica(IMAGES).square().mean().backward()
        learning = {key for key, p in network.named_parameters() if p.grad is not None}
        assert learning == {"head.weight", "head.bias"}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_frozen_network_passes_through_compile_and_functional_calls() -> None:
    network = models.build("wrn_10_1", 5, frozen=True).train()
    weights: dict[str, Tensor] = dict(network.named_parameters())
    wanted = network(IMAGES)
    assert torch.equal(torch.func.functional_call(network, weights, (IMAGES,)), wanted)
    head = {key: p.detach() for key, p in weights.items() if p.requires_grad}
    direction = {key: torch.ones_like(p) for key, p in head.items()}
    slope = torch.func.jvp(
        lambda given: torch.func.functional_call(network, given, (IMAGES,)), (head,), (direction,)
    )[1]
    assert torch.allclose(slope, slope[:, :1].expand_as(slope)) and slope.abs().min() > 0
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(IMAGES), wanted, atol=1e-5)
