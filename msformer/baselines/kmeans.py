"""k-means on the pixels of one image: on Lab values of a colour image, on grey values of a grey one.

MacQueen, "Some Methods for Classification and Analysis of Multivariate Observations", 1967; k-means++ starts of Arthur
and Vassilvitskii, SODA 2007; both by scikit-learn.
"""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2gray, rgb2lab
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from msformer.baselines import LabelMap, Method, Task


def pixel_features(task: Task, position_weight: float) -> NDArray[np.float64]:
    """``[h * w, features]``: colour or grey value, and with a weight the position, in units of the image's side."""
    pixels = task.image.permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    values = rgb2lab(pixels) if task.colour else 100 * rgb2gray(pixels)[..., None]
    if position_weight:
        rows, columns = np.mgrid[:height, :width] * (100 * position_weight / max(height, width))
        values = np.dstack([values, rows, columns])
    return np.asarray(values, dtype=np.float64).reshape(height * width, -1)


def label_map(task: Task, clusters: int, position_weight: float = 0.0) -> LabelMap:
    """`clusters` labels, fewer where the image has fewer values. Lab and grey values lie between 0 and 100."""
    features = pixel_features(task, position_weight)
    model = KMeans(clusters, n_init=4, random_state=task.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct values than clusters
        labels = model.fit_predict(features)
    return LabelMap(labels.reshape(tuple(task.image.shape[1:])).astype(np.uint8))


METHODS = [
    Method("kmeans-2", "k-means, k = 2", 2, partial(label_map, clusters=2)),
    Method("kmeans-3", "k-means, k = 3", 3, partial(label_map, clusters=3)),
]
