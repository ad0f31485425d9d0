"""Builds the compiled extensions of msformer_kernels; everything else about the package is in pyproject.toml.

csrc/extensions.py says what they are and how they are built. An extension that cannot be built, for want of a compiler
say, does not stop the install: the reason is kept in `msformer_kernels/<extension>_error.txt`, which
`msformer_kernels.explain()` shows, and the package works without it. In the environment:

- CXX: another C++ compiler. CUDACXX, CUDA_HOME or CUDA_PATH: where nvcc is, if neither on PATH nor in the package
  nvidia-cuda-nvcc. MSFORMER_CUDA_ARCHS: what to compile the CUDA kernels for, such as 80,90. MSFORMER_CUDA=0: without
  them, whatever is here.
- MSFORMER_CUDA_EMULATE=1, MSFORMER_EMULATE_TILES=1: builds the emulations of the CUDA kernels and of AMX tiles, for
  tests.
- MSFORMER_REQUIRE_NATIVE=1, MSFORMER_REQUIRE_CUDA=1: without the CPU kernels (and the emulation, if wanted), or without
  the CUDA kernels, the install fails.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from extensions import EXTENSIONS  # noqa: E402
from toolchain import BuildFailed, NotBuilt  # noqa: E402

PACKAGE = "msformer_kernels"
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


class BuildExtensions(build_ext):
    """build_ext whose extensions are compiled by ninja, and may be missing in the end."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason = output.with_name(f"{name}_error.txt")
        reason.unlink(missing_ok=True)
        # an editable install is repeated after every change, and compiles what has changed
        temporary = ROOT / "build" if self.editable_mode else Path(self.build_temp).resolve()
        try:
            EXTENSIONS[name].build(output, temporary / name.removeprefix("_"))
        except NotBuilt as error:
            if EXTENSIONS[name].is_required():
                raise
            output.unlink(missing_ok=True)
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{error}\n")
            if isinstance(error, BuildFailed):
                self.warn(f"msformer goes on without its {EXTENSIONS[name].what}: {str(error).splitlines()[0]}")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: takes each extension, or the reason why there is none, to the source folder."""
        folder = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for file in (built, built.with_name(f"{ext.name.rpartition('.')[2]}_error.txt")):
                (folder / file.name).unlink(missing_ok=True)
                if file.exists():
                    self.copy_file(str(file), str(folder / file.name))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(
    packages=[
        *find_packages("kernels"),
        *find_packages(".", include=["msformer", "msformer.*"]),
        *(f"msformer.{name}" for name in find_packages(".", include=["benchmarks", "benchmarks.*"])),
    ],
    # the benchmarks are a package of a checkout, and installed they are msformer.benchmarks
    package_dir={PACKAGE: f"kernels/{PACKAGE}", "msformer.benchmarks": "benchmarks"},
    package_data={
        PACKAGE: ["py.typed", "*.pyi", *(f"{name}_error.txt" for name in EXTENSIONS)],
        "msformer": ["py.typed", "*.css", "**/*.html", "**/*.js"],
        "msformer.benchmarks": ["*.cpp", "*.html", "*.css"],
    },
    ext_modules=[
        Extension(f"{PACKAGE}.{name}", [str(path.relative_to(ROOT)) for path in built.sources], depends=HEADERS)
        for name, built in EXTENSIONS.items()
    ],
    cmdclass={"build_ext": BuildExtensions},
)
