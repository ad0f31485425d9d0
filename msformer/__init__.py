"""MS-Former: segmentation of medical images without labels, by fitting a small two-scale transformer to each image.

`segment` does the whole job for one image; `MSFormer`, `LossWeights` and `Segmentation` are its parts. The command line
is ``msformer``. The operators it is built on are in the package `msformer_kernels`.
"""

from importlib.metadata import PackageNotFoundError, version

from msformer.losses import LossWeights
from msformer.model import MSFormer, MSFormerOutput
from msformer.segment import Segmentation, segment

try:
    __version__ = version("msformer")
except PackageNotFoundError:  # used from a source folder that was never installed
    __version__ = "0+unknown"

__all__ = ["LossWeights", "MSFormer", "MSFormerOutput", "Segmentation", "__version__", "segment"]
