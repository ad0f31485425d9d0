"""MS-Former: segmentation of medical images without labels, by fitting a small two-scale transformer to each image.

`segment` does the whole job for one image; `MSFormer`, `LossWeights` and `Segmentation` are its parts. `train`
trains one network on a folder of images, `load` reads it again. The command line is ``msformer``. The operators it is
built on are in the package `msformer_kernels`. A plain install has the model, the rest needs extras (`extras.py`).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from msformer.extras import explain_imports

if TYPE_CHECKING:
    from msformer.model import MSFormer, MSFormerOutput
    from msformer.presets import LossWeights
    from msformer.segmentation import Segmentation, segment
    from msformer.training.run import train
    from msformer.training.saved import TrainedModel, load

explain_imports()

try:
    __version__ = version("msformer")
except PackageNotFoundError:  # used from a source folder that was never installed
    __version__ = "0+unknown"

__all__ = [
    "LossWeights",
    "MSFormer",
    "MSFormerOutput",
    "Segmentation",
    "TrainedModel",
    "__version__",
    "load",
    "segment",
    "train",
]

_HOME = {
    "LossWeights": "msformer.presets",
    "MSFormer": "msformer.model",
    "MSFormerOutput": "msformer.model",
    "Segmentation": "msformer.segmentation",
    "TrainedModel": "msformer.training.saved",
    "load": "msformer.training.saved",
    "segment": "msformer.segmentation",
    "train": "msformer.training.run",
}


def __getattr__(name: str) -> Any:
    """Imports public names, and torch with them, when they are first used: `msformer --help` needs neither.

    Raises:
        MissingPackage: the name needs an extra that is not installed.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'msformer' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
