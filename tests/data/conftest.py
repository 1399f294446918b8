"""Records that several files of tests read."""

import pytest

from mpl_fast.data.manifest import Manifest
from tests.data.numbered_images import pack_numbered


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """50 training images in 5 classes, image n of class n % 5, in 3 shards; 23 to validate."""
    return pack_numbered(tmp_path_factory.mktemp("numbered"))
