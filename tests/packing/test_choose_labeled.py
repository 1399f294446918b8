"""The draw of labeled images: even, seeded, reproducible, with an error where it is impossible."""

import hashlib
import itertools
import tracemalloc
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpl_fast.errors import ConfigError, DataError
from mpl_fast.packing.plan import choose_labeled as choose
from mpl_fast.packing.plan.choose_labeled import choose_labeled, hash_rank

Images = list[tuple[int, str, str]]


def images_of(counts: dict[str, int]) -> Images:
    names = [
        (name, f"{name}_{number}.jpg") for name, count in counts.items() for number in range(count)
    ]
    return [(7 * at, *pair) for at, pair in enumerate(names)]  # ids need not be consecutive


def rows_of(images: Images) -> AbstractContextManager[choose.Images]:
    """Return the images with a number for each class."""
    numbers = {name: at for at, name in enumerate(dict.fromkeys(name for _, name, _ in images))}
    rows = ((number, numbers[class_name], name) for number, class_name, name in images)
    return choose.images_in_memory(rows, list(numbers))


def chosen_keys(images: Images, how: str | Path, seed: int = 0, balance: str = "count") -> set[str]:
    with rows_of(images) as rows:
        ids = set(choose_labeled(rows, str(how), seed=seed, balance=balance))
    chosen = {f"{class_name}/{name}" for at, class_name, name in images if at in ids}
    assert len(chosen) == len(ids)
    return chosen


def per_class(keys: set[str]) -> Counter[str]:
    return Counter(key.partition("/")[0] for key in keys)


def test_draw_is_the_first_by_keyed_hash() -> None:
    images = images_of({"ant": 20, "bee": 20})
    expected = {
        f"{name}/{file}"
        for name in ("ant", "bee")
        for file in sorted(
            (f"{name}_{number}.jpg" for number in range(20)),
            key=lambda file: hashlib.sha256(f"3:{name}/{file}".encode()).hexdigest(),
        )[:4]
    }
    assert chosen_keys(images, "20%", 3) == expected
    assert chosen_keys(images[::-1], "8", 3) == expected
    assert chosen_keys(images, "8", 4) != expected
    golden = {"ant/ant_6.jpg", "bee/bee_1.jpg"}
    assert chosen_keys(images_of({"ant": 9, "bee": 9}), "2") == golden


def test_even_draw_nests_whatever_the_class_sizes() -> None:
    images = images_of(dict.fromkeys("abcdefg", 50))
    draws = [chosen_keys(images, how, 1) for how in ("7", "10", "5%", "10%", "100", "100%")]
    assert [len(draw) for draw in draws] == [7, 10, 18, 35, 100, 350]
    assert all(small <= large for small, large in itertools.pairwise(draws))
    keys = chosen_keys(images_of({"a": 100, "b": 40, "c": 30}), "50%")
    assert sorted(per_class(keys).values()) == [28, 28, 29]


def test_proportional_draw_follows_the_sizes_and_nests() -> None:
    sizes = {"a": 1000, "b": 300, "c": 61, "d": 10}
    images = images_of(sizes)
    keys = [f"{class_name}/{name}" for _, class_name, name in images]
    draws = {n: chosen_keys(images, str(n), 5, "proportional") for n in (300, 301, 685, 1371)}
    for total, draw in draws.items():
        assert len(draw) == total
        counts = per_class(draw)
        assert all(abs(counts[name] - size * total / 1371) < 1.5 for name, size in sizes.items())
        for name in sizes:  # the first of each class by rank
            own = (key for key in keys if key[0] == name)
            first = sorted(own, key=lambda key: hash_rank(5, key))[: counts[name]]
            assert set(first) == {key for key in draw if key[0] == name}
    assert all(small <= large for small, large in itertools.pairwise(draws.values()))


@pytest.mark.parametrize("balance", ["count", "proportional"])
def test_memory_of_a_draw_does_not_grow_with_the_images(balance: str) -> None:
    """Python's; SQLite's cache and sorter have a limit of their own."""
    peaks = []
    for count in (1_000, 1_000, 20_000):  # the first draw imports NumPy
        with rows_of(images_of({"ant": count, "bee": count})) as rows:
            tracemalloc.start()
            drawn = sum(1 for _ in choose_labeled(rows, "10%", seed=0, balance=balance))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert drawn == count // 5
    assert peaks[2] < peaks[1] + 50_000  # 1.3 bytes an image


_SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(_SIZES, st.integers(0, 10**6), st.integers(0, 1), st.data())
def test_proportional_counts_are_the_first_positions(
    counts: list[int], seed: int, keep: int, data: st.DataObject
) -> None:
    """Sorted as an array of all positions, equal ones by class; the sizes have many of these."""
    sizes = {f"c{at:02}": count for at, count in enumerate(counts)}
    total = data.draw(st.integers(0, sum(counts) - keep * len(counts)))
    starts = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1 - 2**-53]) | st.floats(0, 1),
                                min_size=len(sizes), max_size=len(sizes)))  # fmt: skip
    ranks = dict(zip(sizes, (int(start * ((1 << 64) - 1)) for start in starts), strict=True))
    with mock.patch.object(choose, "_rank", lambda seed, name: ranks[name]):
        found = choose._proportional(sizes, total, seed, keep)
    positions = [
        ((place + ranks[name] / (1 << 64)) / count, name)
        for name, count in sizes.items()
        for place in range(count - keep)
    ]
    assert found == dict.fromkeys(sizes, 0) | Counter(
        name for _, name in sorted(positions, key=lambda one: one[0])[:total]
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("2", "2 labeled images for 3 classes, so that 1 class has none; choose at least 3$"),
        ("7%", "1 labeled image for 3 classes, so that 2 classes have none"),
        ("16", "that is 16 labeled images, the source has 15"),
        ("120%", "that is 18 labeled images, the source has 15"),
        ("0", "that is 0 labeled images"),
        ("0.01%", "that is 0 labeled images"),
        ("ten%", "not a share such as 10%"),
        ("1/0%", "not a share such as 10%"),
        ("0.1", "give a share"),
        ("-3", "give a share"),
        ("missing.txt", "or an existing file"),
        ("", "or an existing file"),
        ("x" * 300, "File name too long"),
        ("1e5000000%", "not a share such as 10%"),
        ("9" * 5000, "not a share such as 10%"),
        ("9" * 5000 + "%", "not a share such as 10%"),
    ],
)
def test_bad_amounts(how: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_keys(images_of({"a": 5, "b": 5, "c": 5}), how)


def test_classes_too_small_for_the_draw() -> None:
    with pytest.raises(DataError, match=r"1 class has .* even share: b \(3 of 5\)"):
        chosen_keys(images_of({"a": 9, "b": 3}), "10")
    with pytest.raises(ConfigError, match="1 small class gets no labeled image: tiny; choose more"):
        chosen_keys(images_of({"a": 5000, "tiny": 1}), "2", 1, "proportional")


def list_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labeled.txt"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "ant/ant_1.jpg\nbee/bee_0.jpg\n",
        "bee_0.jpg\nant_1.jpg",
        "\ufeffant_1.jpg\r\n\r\nbee_0.jpg\r\n",
        "7\t0\tant/ant_1.jpg\n9\t1.000000\tbee/bee_0.jpg\n",
        "train/ant/ant_1.jpg\n./bee/bee_0.jpg\n",
        "ant/ant_1.jpg 0\nbee/bee_0.jpg 1\n",
    ],
)
def test_list_forms(tmp_path: Path, text: str) -> None:
    keys = chosen_keys(images_of({"ant": 3, "bee": 3}), list_file(tmp_path, text))
    assert keys == {"ant/ant_1.jpg", "bee/bee_0.jpg"}


@pytest.mark.parametrize("line", ["great owl/an owl.jpg", "an owl.jpg"])
def test_first_word_is_a_name_only_where_the_whole_line_is_none(tmp_path: Path, line: str) -> None:
    images = [(0, "great owl", "an"), (1, "great owl", "an owl.jpg"), (2, "great owl", "great")]
    assert chosen_keys(images, list_file(tmp_path, f"{line}\n")) == {"great owl/an owl.jpg"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "no name in this list"),
        ("".join(f"cat/{n}.jpg\n" for n in range(12)), r"12 names fit no image: .* and 2 more$"),
        ("ant_0.jpg\nant/ant_0.jpg\n", "1 name is listed more than once: ant/ant_0.jpg"),
        ("ant_0.jpg\n", "1 class has no labeled image: bee"),
        ("same.jpg\n", r"1 name fits images of several classes \(write class/name\): same.jpg"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    images = images_of({"ant": 2, "bee": 2})
    images += [(1000 + at, name, "same.jpg") for at, name in enumerate(("ant", "bee"))]
    with pytest.raises(DataError, match=message) as caught:
        chosen_keys(images, list_file(tmp_path, text))
    assert "\n" not in str(caught.value)
