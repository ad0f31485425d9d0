"""Small data sets in every layout, made by the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image as PILImage

Pixels = NDArray[np.uint8]


def disc(height: int = 40, width: int = 48, radius: float = 9) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:height, :width]
    return np.asarray((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < radius**2)


def lesion(mask: NDArray[np.bool_], seed: int = 0) -> Pixels:
    """A dark object on bright skin, with a little noise."""
    colours = np.where(mask[..., None], (90, 50, 40), (220, 180, 170))
    noise = np.random.default_rng(seed).normal(0, 4, (*mask.shape, 3))
    return np.clip(colours + noise, 0, 255).astype(np.uint8)


def save(path: Path, pixels: NDArray[np.generic], mode: str | None = None) -> Path:
    """Writes an image; `mode` is a mode of Pillow to convert to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PILImage.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def make_pairs(folder: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    for number, name in enumerate(names):
        mask = disc(radius=8 + number)
        save(folder / "images" / f"{name}.png", lesion(mask, number))
        save(folder / "masks" / f"{name}.png", mask.astype(np.uint8) * 255)
    return folder


def make_isic(folder: Path) -> Path:
    for name in ("ISIC_0000001", "ISIC_0000002"):
        save(folder / f"{name}.jpg", lesion(disc()))
        save(folder / f"{name}_Segmentation.png", disc().astype(np.uint8) * 255)
    return folder


def make_ph2(folder: Path) -> Path:
    """IMD002's mask has 24 bits and its rows from top to bottom, as in the original."""
    root = folder / "PH2 Dataset images"
    for name in ("IMD002", "IMD003"):
        save(root / name / f"{name}_Dermoscopic_Image" / f"{name}.bmp", lesion(disc()))
        mask = save(root / name / f"{name}_lesion" / f"{name}_lesion.bmp", disc().astype(np.uint8) * 255, "1")
        if name == "IMD002":
            write_top_down_bmp(mask, np.repeat(disc()[..., None], 3, axis=2).astype(np.uint8) * 255)
    return folder


def write_top_down_bmp(path: Path, pixels: Pixels) -> None:
    """24 bits, negative height. Rows are a multiple of 4 bytes long."""
    height, width, _ = pixels.shape
    header = b"BM" + np.array([54 + pixels.size, 0, 54, 40, width, -height], "<i4").tobytes()
    header += np.array([1, 24], "<i2").tobytes() + np.zeros(6, "<i4").tobytes()
    path.write_bytes(header + pixels[..., ::-1].tobytes())


def chest(lung: NDArray[np.bool_]) -> NDArray[np.int16]:
    """A slice in Hounsfield units: air, a body, and lungs in it."""
    height, width = lung.shape
    rows, columns = np.mgrid[:height, :width]
    body = ((rows - height / 2) / (0.42 * height)) ** 2 + ((columns - width / 2) / (0.45 * width)) ** 2 < 1
    return np.where(lung, -850, np.where(body, 40, -1000)).astype(np.int16)


def lungs(size: int = 64) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:size, :size]
    return np.asarray(
        sum(
            (((rows - size / 2) / (0.22 * size)) ** 2 + ((columns - x * size) / (0.13 * size)) ** 2 < 1)
            for x in (0.33, 0.67)
        )
        > 0
    )


def make_lung(folder: Path) -> Path:
    for kind, pixels in (("2d_images", chest(lungs())), ("2d_masks", lungs().astype(np.int16))):
        (folder / kind).mkdir(parents=True)
        tifffile.imwrite(folder / kind / "ID_0001_Z_0100.tif", pixels)
    return folder
