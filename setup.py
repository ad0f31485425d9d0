"""Builds `msformer_kernels._native` with ninja; everything else about the package is in pyproject.toml.

The extension is a pybind11 module that does not link torch, so one build works with every torch. The CPU kernels are
compiled once per instruction set (on x86-64: AVX-512 with and without BF16, AVX2 with FMA, and the baseline) and
picked at run time.

Without a working compiler the install goes on: the reason is kept in `msformer_kernels/_native_error.txt`, which
`msformer_kernels.explain()` shows, and the package works on plain PyTorch. MSFORMER_REQUIRE_NATIVE=1 makes it an error.
CXX names another compiler.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
KERNELS = sorted(str(p) for p in CPU.glob("*.cpp") if p.name != "memory.cpp")
COMMON = ["csrc/cpu/memory.cpp", "csrc/bindings.cpp"]
HEADERS = sorted(str(p) for p in CPU.glob("*.h"))
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
# multiply-add contraction is where the speed is; no value depends on errno or on floating-point traps
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# the plain variant comes first: where the linker merges equal inline functions it keeps the first, which runs anywhere
VARIANTS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = [
        *VARIANTS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]
    VARIANTS["avx512_bf16"] = [*VARIANTS["avx512"], "-mavx512bf16"]


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


def supported_variants(compiler: list[str], temporary: Path) -> dict[str, list[str]]:
    """The variants that the compiler knows; older ones have never heard of AVX-512 BF16."""
    if "avx512_bf16" not in VARIANTS:
        return VARIANTS
    probe = temporary / "bf16.cpp"
    probe.write_text(
        "#include <immintrin.h>\n"
        "__m512 add(__m512 s, __m512bh a) { return _mm512_dpbf16_ps(s, a, a); }\n"
        'int main() { __builtin_cpu_init(); return __builtin_cpu_supports("avx512bf16"); }\n'
    )
    command = [*compiler, *VARIANTS["avx512_bf16"], "-c", str(probe), "-o", str(temporary / "bf16.o")]
    known = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return {name: flags for name, flags in VARIANTS.items() if known or name != "avx512_bf16"}


def openmp_flags(compiler: list[str], temporary: Path) -> list[str]:
    """What switches OpenMP on; nothing where the compiler has none, and the kernels then run on one thread."""
    probe = temporary / "openmp.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*compiler, "-fopenmp", str(probe), "-o", str(temporary / "openmp")]
    return ["-fopenmp"] if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


def write_ninja_file(
    script: Path,
    compiler: list[str],
    variants: dict[str, list[str]],
    openmp: list[str],
    includes: list[str],
    output: Path,
) -> None:
    """Object files are named relative to the folder of the script. The includes are for the bindings alone: their
    folders differ from one isolated build to the next, and what does not need them is then not compiled again."""
    from ninja.ninja_syntax import Writer

    flags = [*FLAGS, f"-I{ROOT / 'csrc'}", *openmp]
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    if len(variants) > 1:
        flags.append("-DMSFORMER_X86_VARIANTS")
    if "avx512_bf16" in variants:
        flags.append("-DMSFORMER_BF16_VARIANT")
    with script.open("w") as file:
        ninja = Writer(file)
        compile_command = f"{shlex.join([*compiler, *flags])} $extra -MD -MF $out.d -c $in -o $out"
        ninja.rule("compile", compile_command, description="compile $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{shlex.join([*compiler, *link, *openmp])} $in -o $out", description="link")
        sources = [(source, "", [f"-I{path}" for path in includes]) for source in COMMON]
        sources += [(source, f"{variant}/", extra) for variant, extra in variants.items() for source in KERNELS]
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
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    script = temporary / "build.ninja"
    variants, openmp = supported_variants(compiler, temporary), openmp_flags(compiler, temporary)
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


def subpackages(name: str, folder: str) -> list[str]:
    return [name, *(f"{name}.{found}" for found in find_packages(folder))]


setup(
    packages=[*subpackages("msformer_kernels", "kernels"), *subpackages("msformer", "msformer")],
    package_dir={"msformer_kernels": "kernels"},
    package_data={
        "msformer_kernels": ["py.typed", "_native_error.txt"],
        "msformer": ["py.typed", "evaluation/page.html"],
    },
    ext_modules=[Extension("msformer_kernels._native", sources=[*COMMON, *KERNELS], depends=HEADERS)],
    cmdclass={"build_ext": BuildNative},
)
