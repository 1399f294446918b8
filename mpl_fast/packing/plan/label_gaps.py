"""Numbers of classes that no training image has."""

from collections.abc import Collection, Sequence

from mpl_fast.errors import DataError
from mpl_fast.packing.first_few import counted, first_few

_MOST, _MOST_PER_IMAGE = 1000, 10  # numbers without an image, above which they are refused


def describe_gaps(
    spec: str, names: Sequence[str], trained: Collection[str], images: int
) -> list[str]:
    """Return a warning of labels that no training image has; DataError if they are too many.

    names are those of all classes by label, trained those of the training images. Only labels
    without a name are refused: a list of names may be much longer than a sample of images.
    """
    unused = ((label, name) for label, name in enumerate(names) if name not in trained)
    # No list yet: a label may be in the millions.
    if sum(name == str(label) for label, name in unused) > max(_MOST, _MOST_PER_IMAGE * images):
        what = counted(len(trained), "label", "different labels")
        raise DataError(
            f"{spec}: its labels go up to {len(names) - 1}, but its {counted(images, 'image')} "
            f"have only {what}: each number is a class, so renumber them 0 to {len(trained) - 1}"
        )
    shown = [
        name if name == str(label) else f"{label} ({name})"
        for label, name in enumerate(names)
        if name not in trained
    ]
    what = f"of the labels 0 to {len(names) - 1} {'has' if len(shown) == 1 else 'have'}"
    return [f"{spec}: {len(shown)} {what} no image: {first_few(shown)}"] if shown else []
