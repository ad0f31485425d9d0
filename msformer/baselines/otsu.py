"""Otsu's threshold on grey values: two labels, dark and bright.

Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Transactions on Systems, Man, and Cybernetics
1979.
"""

from __future__ import annotations

import numpy as np
from skimage.filters import threshold_otsu

from msformer.baselines import LabelMap, Method, Task
from msformer.selection import grey_levels


def label_map(task: Task) -> LabelMap:
    """Label 1 is brighter than the threshold; a constant image is one label."""
    grey = grey_levels(task.image)
    return LabelMap((grey > threshold_otsu(grey)).astype(np.uint8))


METHODS = [Method("otsu", "Otsu", 1, label_map, tables=(1, 2))]
