"""Builds `msformer_kernels._native` with ninja; everything else about the package is in pyproject.toml.

The extension is a pybind11 module that does not link torch, so one build works with every torch. The CPU kernels are
compiled once per variant (on x86-64: AVX-512 with and without BF16, AVX2 with FMA, and the baseline), and the best that
the processor has is picked at run time; csrc/variants.py declares them.

Without a working compiler the install goes on: the reason is kept in `msformer_kernels/_native_error.txt`, which
`msformer_kernels.explain()` shows, and the package works on plain PyTorch. MSFORMER_REQUIRE_NATIVE=1 makes it an error.
CXX names another compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from variants import FLAGS, VARIANTS, Variant, write_variants_header  # noqa: E402

ONCE = ["csrc/module.cpp", "csrc/dispatch.cpp", "csrc/cpu/base/memory.cpp"]
KERNELS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*/*.cpp") if p.name != "memory.cpp")
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))


class BuildFailed(Exception):
    """The native extension cannot be built here; the first line of the message says why."""


def find_compiler() -> list[str]:
    """The command of a C++ compiler; CXX may carry options of its own."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    names = wanted[0] if wanted else "g++, c++, clang++"
    raise BuildFailed(f"no C++ compiler: {names} not found on PATH (on Debian: apt install g++)")


def supported_variants(compiler: list[str], temporary: Path) -> list[Variant]:
    """The variants that the compiler knows; older ones have never heard of AVX-512 BF16."""

    def is_known(variant: Variant) -> bool:
        if not variant.probe:
            return True
        probe = temporary / f"{variant.name}.cpp"
        conditions = f"int main() {{ return {variant.condition()}; }}\n"
        probe.write_text(f"#include <immintrin.h>\n{variant.probe}\n{conditions}")
        command = [*compiler, *variant.flags, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    return [variant for variant in VARIANTS if is_known(variant)]


def openmp_flags(compiler: list[str], temporary: Path) -> list[str]:
    """What switches OpenMP on; nothing where the compiler has none, and the kernels then run on one thread."""
    probe = temporary / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*compiler, "-fopenmp", str(probe), "-o", str(temporary / "openmp")]
    return ["-fopenmp"] if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


def write_ninja_file(
    script: Path,
    compiler: list[str],
    variants: list[Variant],
    openmp: list[str],
    includes: list[str],
    output: Path,
) -> None:
    """Object files are named relative to the folder of the script. The includes are for what is compiled once alone:
    their folders differ from one isolated build to the next, and what does not need them is then not compiled again."""
    from ninja.ninja_syntax import Writer

    flags = [*FLAGS, *openmp]
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    with script.open("w") as file:
        ninja = Writer(file)
        compile_command = f"{shlex.join([*compiler, *flags])} $extra -MD -MF $out.d -c $in -o $out"
        ninja.rule("compile", compile_command, description="compile $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{shlex.join([*compiler, *link, *openmp])} $in -o $out", description="link")
        sources = [(source, "", [f"-I{path}" for path in includes]) for source in ONCE]
        # the plainest variant comes first: where the linker merges equal inline functions it keeps the first, which
        # runs anywhere
        for variant in reversed(variants):
            extra = [*variant.flags, *variant.definitions()]
            sources += [(source, f"{variant.name}/", extra) for source in KERNELS]
        built = []
        for source, folder, extra in sources:
            built.append(f"{folder}{Path(source).stem}.o")
            ninja.build(built[-1], "compile", str(ROOT / source), variables={"extra": shlex.join(extra)})
        ninja.build(str(output), "link", built)


def compile_native(output: Path, temporary: Path) -> None:
    """Builds the extension at `output` (its name carries the Python ABI), object files under `temporary`."""
    compiler = find_compiler()
    try:
        import ninja
        import pybind11
    except ImportError as error:
        raise BuildFailed(f"a build requirement is missing: {error}") from error
    temporary.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(temporary)]
    script = temporary / "build.ninja"
    variants, openmp = supported_variants(compiler, temporary), openmp_flags(compiler, temporary)
    write_variants_header(temporary / "variants.h", variants)
    write_ninja_file(script, compiler, variants, openmp, includes, output)
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(temporary)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout)
    if result.returncode != 0:
        errors = [line for line in result.stdout.splitlines() if "error" in line.lower() or "FAILED" in line]
        reason = errors[0] if errors else "no message"
        raise BuildFailed(f"{shlex.join(compiler)} failed: {reason}\n\n{result.stdout[-8000:]}")


class BuildNative(build_ext):
    """build_ext whose only extension is compiled by ninja, and may fail."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason = output.parent / "_native_error.txt"
        reason.unlink(missing_ok=True)
        try:
            # an editable install is repeated after every change, and compiles what has changed
            temporary = ROOT / "build" / "native" if self.editable_mode else Path(self.build_temp)
            compile_native(output, temporary.resolve())
        except BuildFailed as error:
            if os.environ.get("MSFORMER_REQUIRE_NATIVE") == "1":
                raise
            output.unlink(missing_ok=True)
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{error}\n")
            self.warn(f"msformer goes on without its compiled CPU kernels: {str(error).splitlines()[0]}")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: takes the extension, or the reason why there is none, to the source folder."""
        folder = Path(self.get_finalized_command("build_py").get_package_dir("msformer_kernels"))
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for file in (built, built.parent / "_native_error.txt"):
                (folder / file.name).unlink(missing_ok=True)
                if file.exists():
                    self.copy_file(str(file), str(folder / file.name))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(
    packages=[*find_packages("kernels"), *find_packages(".", include=["msformer", "msformer.*"])],
    package_dir={"msformer_kernels": "kernels/msformer_kernels"},
    package_data={
        "msformer_kernels": ["py.typed", "_native.pyi", "_native_error.txt"],
        "msformer": ["py.typed", "evaluation/page.html"],
    },
    ext_modules=[Extension("msformer_kernels._native", sources=[*ONCE, *KERNELS], depends=HEADERS)],
    cmdclass={"build_ext": BuildNative},
)
