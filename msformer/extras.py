"""What is missing, and which extra of the package brings it, in one sentence.

A plain install has the model and the kernels. All else belongs to an extra, and says so where it is used without:
`explain_imports` does that for every module of this package, `missing_package` for imports within functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

EXTRAS = {
    "segment": {
        "PIL": "pillow",
        "click": "click",
        "imagecodecs": "imagecodecs",
        "jinja2": "jinja2",
        "markupsafe": "markupsafe",
        "matplotlib": "matplotlib",
        "packaging": "packaging",
        "rich": "rich",
        "safetensors": "safetensors",
        "scipy": "scipy",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "tifffile": "tifffile",
    },
    "train": {"joblib": "joblib"},
    "evaluate": {"monai": "monai", "pandas": "pandas"},
    "medical": {"gdcm": "python-gdcm", "nibabel": "nibabel", "pydicom": "pydicom"},
    "heif": {"pillow_heif": "pillow-heif"},
    "hub": {"huggingface_hub": "huggingface-hub"},
    "cluster": {"ray": "ray"},
    "bench": {
        "einops": "einops",
        "psutil": "psutil",
        "pydantic": "pydantic",
        "pytest": "pytest",
        "pytest_benchmark": "pytest-benchmark",
    },
}
"""By extra, what is imported, and under which name pip has it."""


class MissingPackage(ModuleNotFoundError):
    """A module of this package needs an extra that is not installed; the message says which."""


def missing_package(error: ImportError, extra: str | None = None) -> str | None:
    """What to install after a failed import, in a sentence; None where no extra brings it.

    Args:
        extra: of what is imported here, for packages that `EXTRAS` does not name.
    """
    if isinstance(error, MissingPackage):
        return str(error)
    name = (error.name or "").partition(".")[0]
    found = next((known for known, packages in EXTRAS.items() if name in packages), extra)
    if found is None or not isinstance(error, ModuleNotFoundError) or name in ("", "msformer", "msformer_kernels"):
        return None
    return f"{EXTRAS.get(found, {}).get(name, name)} is not installed; run: pip install 'msformer[{found}]'"


class _Explaining(MetaPathFinder):
    """Finds modules of this package as the other finders do; a package that they lack raises MissingPackage."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("msformer."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if found is None or found.loader is None:
            return found
        run = found.loader.exec_module

        def run_explained(module: ModuleType) -> None:
            try:
                run(module)
            except ModuleNotFoundError as error:
                sentence = missing_package(error)
                if sentence is None or isinstance(error, MissingPackage):
                    raise
                raise MissingPackage(sentence, name=error.name) from None

        found.loader.exec_module = run_explained  # type: ignore[method-assign]
        return found


def explain_imports() -> None:
    """From now on, modules of this package that lack a package raise MissingPackage, which says how to get it."""
    sys.meta_path.insert(0, _Explaining())
