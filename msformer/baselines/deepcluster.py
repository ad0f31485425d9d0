"""DeepCluster, ported to the pixels of one image.

Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018: k-means on
the features gives labels, the network learns to predict them, and so on. Here a pixel is what an image is there, and
an epoch is one step on the whole image, in which each cluster has the same weight, as sampling them uniformly would
give it.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from msformer.baselines import LabelMap, Method, Task
from msformer.baselines.pixel_network import CHANNELS, pixel_network
from msformer.segmentation import seeded
from msformer.streams import own_stream

CLUSTERS = 3
ROUNDS = 20
COMPONENTS = 256


def whitened(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[pixels, channels]`` -> principal components of variance 1, at most `COMPONENTS`, rows of length 1.

    Components that are only rounding noise are left out; of features that are all the same, nothing is left but zeros.
    """
    if np.ptp(features, axis=0).max() == 0:
        return np.zeros((len(features), 1), dtype=np.float32)
    found = PCA(min(COMPONENTS, *features.shape), svd_solver="covariance_eigh").fit(features)
    kept = found.explained_variance_ > 1e-6 * found.explained_variance_[0]
    values = found.transform(features)[:, kept] / np.sqrt(found.explained_variance_[kept])
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.maximum(lengths, 1e-12), dtype=np.float32)


def cluster(features: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.integer]:
    """k-means labels of the whitened features; 20 iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        return np.asarray(KMeans(clusters, n_init=1, max_iter=20, random_state=seed).fit_predict(whitened(features)))


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits ``[1, K, h, w]`` against labels ``[1, h, w]``, each label that occurs with the same total weight."""
    counts = torch.bincount(labels.flatten(), minlength=logits.shape[1])
    weights = counts.clamp(min=1).to(logits.dtype).reciprocal()
    return F.cross_entropy(logits, labels, weight=weights)


def label_map(task: Task) -> LabelMap:
    """The k-means labels after the last round."""
    height, width = task.image.shape[1:]
    with own_stream(task.device):
        with seeded(task.seed, task.device):
            network = pixel_network()
            heads = [nn.Conv2d(CHANNELS, CLUSTERS, 1) for _ in range(ROUNDS)]
            for head in heads:
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        network = network.to(task.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        image = task.image[None].to(task.device).contiguous(memory_format=torch.channels_last)
        body = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
        for number, head in enumerate(heads):
            top = torch.optim.SGD(head.to(task.device).parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
            features = network(image)
            rows = features.detach().permute(0, 2, 3, 1).reshape(-1, CHANNELS).cpu().numpy()
            labels = cluster(rows, CLUSTERS, task.seed)
            targets = torch.from_numpy(labels.reshape(1, height, width)).long().to(task.device)
            loss = balanced_cross_entropy(head(features.relu()), targets)
            for optimizer in (body, top):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (body, top):
                optimizer.step()
            task.report(number + 1, ROUNDS)
        with torch.no_grad():
            rows = network(image).permute(0, 2, 3, 1).reshape(-1, CHANNELS).cpu().numpy()
    return LabelMap(cluster(rows, CLUSTERS, task.seed).reshape(height, width), ROUNDS)


METHODS = [Method("deepcluster", "DeepCluster", 6, label_map)]
