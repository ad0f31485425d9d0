"""Segments a CT volume, slice by slice, and looks at it: the lungs of a synthetic chest.

Run: ``python examples/ct_volume.py --out ct/`` (needs ``pip install "msformer[segment,medical]"``).
With a volume of your own: ``--volume chest.nii.gz``.
Takes: 27 s of CPU time for the four slices of 96 x 96 that it makes itself.
Prints: what `msformer segment` says, and the volume of the lungs beside the true one.
Writes: the volume (ct/chest.nii.gz), its mask and label map on the same voxels (ct/results/chest.mask.nii.gz), and a
picture of all slices with the border of the mask (ct/montage.png).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from msformer.pictures import outline

SPACING = (3.0, 3.0, 8.0)
"""Millimetres of a voxel."""


def chest(size: int, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """A chest in Hounsfield units ``[size, size, slices]``, and its lungs."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    volume, lungs = [], []
    for level in np.linspace(0.75, 1, slices):
        body = np.hypot(rows / 0.7, columns / 0.92) < 1
        lung = np.hypot(rows / 0.46, (np.abs(columns) - 0.43) / 0.3) < level
        spine = np.hypot(rows - 0.5, columns) < 0.13
        values = np.select([spine, lung, body], [400.0, -800.0, 40.0], -1000.0)
        vessels = lung & (random.random(lung.shape) < 0.01)
        values[vessels] = -300
        volume.append(values + random.normal(0, 25, values.shape))
        lungs.append(lung)
    return np.stack(volume, axis=-1).astype(np.int16), np.stack(lungs, axis=-1)


def montage(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The slices side by side, four a row, from -1000 to 400 HU, the border of the mask in green ``[H, W, 3]``."""
    grey = ((values.clip(-1000, 400) + 1000) / 1400 * 255).astype(np.uint8)
    pictures = []
    for index in range(values.shape[2]):
        image, found = (array[..., index].repeat(3, axis=0).repeat(3, axis=1) for array in (grey, mask))
        pictures.append(outline(image[..., None].repeat(3, axis=2), found))
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % min(4, len(pictures)))
    across = min(4, len(pictures))
    lines = [np.concatenate(pictures[i : i + across], axis=1) for i in range(0, len(pictures), across)]
    return np.concatenate(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=Path, help="a NIfTI file; without it one is made")
    parser.add_argument("--out", type=Path, default=Path("ct"), help="folder for the results")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--size", type=int, default=65, help="side of the fitted slices, pixels")
    parser.add_argument("--max-steps", type=int, default=20, help="of each fit")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    source, lungs = options.volume, None
    if source is None:
        source = options.out / "chest.nii.gz"
        values, lungs = chest(96, options.slices)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([*SPACING, 1.0])), source)

    # NIfTI does not say what it is of, so --modality CT does; without it nothing is taken for CT
    results = options.out / "results"
    command = [sys.executable, "-m", "msformer", "segment", str(source), "--out", str(results)]
    command += ["--modality", "CT", "--slice", "all", "--mask", "--preset", "quick"]
    subprocess.run([*command, "--size", str(options.size), "--max-steps", str(options.max_steps)], check=True)

    image = nibabel.load(source)
    mask = nibabel.load(results / f"{source.name.removesuffix('.gz').removesuffix('.nii')}.mask.nii.gz")
    found = np.asarray(mask.dataobj) > 0
    litres = np.prod(mask.header.get_zooms()) / 1e6
    print(f"lungs: {found.sum() * litres:.2f} litres found")
    if lungs is not None:
        overlap = 2 * (found & lungs).sum() / (found.sum() + lungs.sum())
        print(f"lungs: {lungs.sum() * litres:.2f} litres in truth, Dice {100 * overlap:.1f} %")
    Image.fromarray(montage(image.get_fdata(), found)).save(options.out / "montage.png")
    print(f"every slice with the border of its mask: {options.out / 'montage.png'}")


if __name__ == "__main__":
    main()
