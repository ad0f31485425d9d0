"""Builds `msformer_kernels._native` with ninja; everything else about the package is in pyproject.toml.

The extension is a pybind11 module that does not link torch, so one build works with every torch. The CPU kernels are
compiled once per variant (on x86-64: AVX-512 with and without BF16, AVX2 with FMA, and the baseline), and the best that
the processor has is picked at run time. `VARIANTS` is the one place that declares them: flags, namespace, vector width,
engine, detection and dispatch follow from it.

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
from dataclasses import dataclass, replace
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ONCE = ["csrc/module.cpp", "csrc/dispatch.cpp", "csrc/cpu/base/memory.cpp"]
KERNELS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*/*.cpp") if p.name != "memory.cpp")
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
# multiply-add contraction is where the speed is; no value depends on errno or on floating-point traps
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


@dataclass(frozen=True)
class Variant:
    """The CPU code for one kind of processor. Its name is also its namespace and what MSFORMER_CPU_ISA calls it."""

    name: str
    vector_bytes: int
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """What the processor must have, as `__builtin_cpu_supports` names it."""
    bfloat16_engine: str = "Values<float>"
    """How products of bfloat16 tensors are done: a class of csrc/cpu/engine."""
    probe: str = ""
    """A line of C++ that an old compiler may not know; without it there is no such variant."""

    def definitions(self) -> list[str]:
        names = {
            "MSFORMER_VARIANT": self.name,
            "MSFORMER_VECTOR_BYTES": self.vector_bytes,
            "MSFORMER_BFLOAT16_ENGINE": self.bfloat16_engine,
        }
        return [f"-D{name}={value}" for name, value in names.items()]

    def condition(self) -> str:
        """Whether the processor has it, in C++."""
        return " && ".join(f'__builtin_cpu_supports("{name}")' for name in self.features) or "true"


PLAIN = Variant("plain", vector_bytes=16)
AVX2 = Variant("avx2", 32, flags=("-mavx2", "-mfma", "-mf16c"), features=("avx2", "fma"))
AVX512 = Variant(
    "avx512",
    64,
    flags=(*AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    features=(*AVX2.features, "avx512f", "avx512bw", "avx512dq", "avx512vl"),
)
AVX512_BF16 = replace(
    AVX512,
    name="avx512_bf16",
    flags=(*AVX512.flags, "-mavx512bf16"),
    features=(*AVX512.features, "avx512bf16"),
    bfloat16_engine="Pairs",
    probe="__m512 add(__m512 s, __m512bh a) { return _mm512_dpbf16_ps(s, a, a); }",
)
# best first
VARIANTS = [PLAIN]
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS = [AVX512_BF16, AVX512, AVX2, PLAIN]


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


def write_variants_header(path: Path, variants: list[Variant]) -> None:
    """What csrc/dispatch.cpp includes; only written if it changes, so that nothing is compiled again for it."""
    rows = "".join(f" \\\n  X({variant.name}, {variant.condition()})" for variant in variants)
    text = f"// Made by setup.py from its list of variants, best first.\n#define MSFORMER_FOR_EACH_VARIANT(X){rows}\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


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
