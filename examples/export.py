"""A block exported with torch.export, compiled ahead of time with AOTInductor, saved, loaded and run.

Run: ``python examples/export.py`` (needs ``pip install msformer`` and a C++ compiler; without one it says so).
Takes: 13 s of CPU time, most of it the compiler.
Prints: the operators of the exported graph, where the package is and how large, and how far its output is from that
of the model.

The program that loads the package imports `msformer_kernels`, which brings the operators; it needs no compiler.
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from msformer_kernels import EfficientTransformerBlock


class Model(nn.Module):
    """Grey images ``[B, 1, H, W]`` to two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 3, padding=1)
        self.block = EfficientTransformerBlock(32, num_heads=2)
        self.head = nn.Linear(32, 2)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        tokens, _ = self.block(self.embed(image).flatten(2).transpose(1, 2), height, width)
        return self.head(tokens).transpose(1, 2).unflatten(2, (height, width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("model.pt2"), help="the package")
    out = parser.parse_args().out

    torch.manual_seed(0)
    model, image = Model().eval(), torch.randn(1, 1, 32, 48)
    program = torch.export.export(model, (image,))
    names = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    print("operators:", ", ".join(f"{name} {count}" for name, count in names.items() if name.startswith("msformer")))
    with torch.no_grad():
        expected = model(image)
        difference = (program.module()(image) - expected).abs().max().item()
    print(f"the exported program differs by {difference:.1e}")

    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as Inductor finds it
    if shutil.which(compiler) is None:
        print(f"no C++ compiler here: {compiler} (install it, or name one in CXX): not compiled ahead of time")
        return
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(out.with_suffix(".pt2").absolute()))
    print(f"package {package}, {Path(package).stat().st_size / 1e3:.0f} kB")
    compiled = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        difference = (compiled(image) - expected).abs().max().item()
    print(f"the package differs by {difference:.1e}")


if __name__ == "__main__":
    main()
