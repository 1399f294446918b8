"""A map of features in two dimensions."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from mpl_fast.errors import DataError
from mpl_fast.report.measures import Floats

FEWEST = 12  # images that a map can be made of
COMPONENTS = 50


def embed(features: Floats) -> Floats:
    """t-SNE of ``(M, F)`` features after PCA to 50 dimensions: ``(M, 2)`` float32. Raises
    `DataError` for features that are all equal."""
    wide = np.nan_to_num(features.astype(np.float32))
    if not np.ptp(wide, 0).any():
        raise DataError("the features of all images are equal")
    reduced = PCA(min(COMPONENTS, *wide.shape), random_state=0).fit_transform(wide)
    perplexity = min(30.0, (len(wide) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
    placed: Floats = np.asarray(found, np.float32)
    return placed
