"""A SegFormer of transformers whose feed-forward layers and decoder are replaced by fused ones, without edits to it.

Run: ``python examples/segformer_patched.py`` (needs ``pip install msformer transformers``).
Takes: 7 s of CPU time, most of it imports.
Prints: what was replaced and what was left alone and why, how far the outputs are from the original's, the time of a
training step before and after, and that `undo` brings the original back.
"""

import argparse
import time

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import msformer_kernels

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--size", type=int, default=128, help="side of the images, pixels; 512 shows more of the gain")
size = parser.parse_args().size

torch.manual_seed(0)
widths = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 128, 256], "decoder_hidden_size": 128}
model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=2, drop_path_rate=0.0, **widths)).eval()
images = torch.randn(2, 3, size, size)


def step_time() -> float:
    """Milliseconds of a forward and backward, the fastest of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        model(pixel_values=images).logits.square().mean().backward()
        seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds)


with torch.no_grad():
    original = model(pixel_values=images).logits
before = step_time()
report = msformer_kernels.patch(model, example=(images,), min_gain=0)  # 0: also what gains nothing at this size
print(report)
with torch.no_grad():
    difference = (model(pixel_values=images).logits - original).abs().max().item()
print(f"largest difference of the logits: {difference:.1e}, of values up to {original.abs().max().item():.1e}")
print(f"a training step of 2 images of {size} x {size}: {before:.0f} ms before, {step_time():.0f} ms after")
report.undo()
with torch.no_grad():
    print(f"undone, the same bits: {torch.equal(model(pixel_values=images).logits, original)}")
