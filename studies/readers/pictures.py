"""What the readers of ordinary pictures make of files, beside independent readers.

    python -m studies.readers.pictures [FOLDER ...]

Reads every picture below the folders, by default those that installed Python packages ship; Pillow's own are in its
source distribution (`pip download --no-deps --no-binary :all: pillow`). The second reader is one
that the first does not use: imagecodecs (libspng, libjpeg-turbo, giflib, OpenJPEG, ...) for what goes through Pillow,
Pillow for PNG of 16 bits, libtiff (through imagecodecs and Pillow) for TIFF. Pictures are compared in colours, or
where both have one channel in grey, in the bits of the second reader; alpha is left out.
"""

from __future__ import annotations

import io
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageCms

from msformer.io.base import ImageError
from msformer.io.containers import is_heif
from msformer.io.files import SUFFIXES
from msformer.io.medical import SUFFIXES_MEDICAL
from msformer.io.ordinary import read_raster
from msformer.io.raster import Raster, turn_upright

Pixels = NDArray[Any]

EQUAL, ROUNDED, REFUSED, FIRST, SECOND, DIFFERENT = (
    *("equal", "equal but for rounding", "refused by both"),
    *("read here alone", "read by the second alone", "different"),
)
REASONS = {
    "multipage.*": "the largest page is read, with a warning, not the first",
    "separate_planar_extra_samples.tiff": "its tags say that the samples are signed",
    "tiff_tiled_jpeg_oob_read.tif": "made to crash: the sizes of its tiles are wrong",
    "tiff_overflow_rows_per_strip.tif": "holds a tenth of its pixels; libtiff makes the others black",
    "truncated_jpeg.jpg": "half of it is missing; libjpeg makes it grey",
    "ultrahdr.jpg": "its end is missing; libjpeg makes it grey",
    "test_extents.gif": "is as large as the file says, not as its frames reach",
    "invalid_header_length.jp2": "made to crash: its header is wrong",
    "bad.*bmp|pal8os2v2-16.bmp|rgb(32|a?16|a?24).*bmp": "bit fields and headers that few programs write or read",
}
"""Of Pillow's tests, by pattern of the name: why pictures differ, or are read by the second reader alone."""
BOMBS = ("decompression_bomb_extents.gif",)
"""Of Pillow's tests: a picture of 4 gigapixels, which second readers decode."""
ROUNDING = 2
"""Of 255: what decoders of lossy files, and conversions between colours, may differ by; in more than 1% of the samples
by three times that, where colours are stored at half the resolution."""


@dataclass(frozen=True)
class Compared:
    """A file, what became of it, and why."""

    path: Path
    kind: str
    outcome: str
    reason: str


def kind_of(data: bytes) -> str:
    """By the first bytes; "" for none that is meant."""
    signatures = {
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"\xff\xd8": "JPEG",
        b"GIF8": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"II+\0": "TIFF",
        b"MM\0+": "TIFF",
        b"\0\0\0\x0cjP": "JPEG 2000",
        b"\xff\x4f\xff\x51": "JPEG 2000",
    }
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        return "HEIC" if is_heif(data[:32]) else "AVIF" if b"avi" in data[8:32] else ""
    if data[:1] == b"P" and data[1:2] in b"123456":
        return "PNM"
    return next((kind for start, kind in signatures.items() if data.startswith(start)), "")


def second_readers(kind: str, data: bytes) -> list[Callable[[bytes], Pixels]]:
    """Independent decoders, the best first."""
    if kind == "TIFF":
        return [_tiff_with_pillow, _tiff_with_libtiff, _tiff_as_rgb]
    if kind == "PNG":
        return [imagecodecs.spng_decode, _png_with_pillow if data[24] == 16 else imagecodecs.png_decode]
    decoders = {
        "JPEG": _jpeg_as_rgb,
        "GIF": lambda data: imagecodecs.gif_decode(data, index=0),
        "BMP": imagecodecs.bmp_decode,
        "WebP": imagecodecs.webp_decode,
        "JPEG 2000": imagecodecs.jpeg2k_decode,
        "AVIF": lambda data: imagecodecs.avif_decode(data, index=0),
    }
    return [decoders[kind]] if kind in decoders else []


def _png_with_pillow(data: bytes) -> Pixels:
    """Of 16 bits: grey whole, the upper 8 bits of colours."""
    with PILImage.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.asarray(image)


def _jpeg_as_rgb(data: bytes) -> Pixels:
    pixels = np.asarray(imagecodecs.jpeg8_decode(data))
    if pixels.ndim == 3 and pixels.shape[2] == 4:  # inverted by Adobe's programs, whose mark most of such files have
        inks = pixels.astype(np.float64) if b"Adobe" in data[:65536] else 255.0 - pixels
        return np.asarray((inks[..., :3] * inks[..., 3:] / 255).round(), np.uint8)
    return pixels


def _tiff_with_pillow(data: bytes) -> Pixels:
    with PILImage.open(io.BytesIO(data), formats=["TIFF"]) as image:
        if image.mode == "LAB":
            profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
            return np.asarray(converted)
        if image.mode in ("CMYK", "P", "PA", "YCbCr"):
            return np.asarray(image.convert("RGB"))
        return np.asarray(image)


def _tiff_with_libtiff(data: bytes) -> Pixels:
    return np.asarray(imagecodecs.tiff_decode(data))


def _tiff_as_rgb(data: bytes) -> Pixels:
    return np.asarray(imagecodecs.tiff_decode(data, asrgb=True))


def compare(path: Path) -> Compared | None:
    """None for what is no picture by its content."""
    data = path.read_bytes()
    kind = kind_of(data)
    if not kind or not data:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raster, reason = None, ""
        try:
            raster = read_raster(path)
        except ImageError as error:
            reason = str(error).removeprefix(f"{path}: ")
        others, failed = [], ""
        for read in () if path.name in BOMBS else second_readers(kind, data):
            try:
                others.append(np.asarray(read(data)))
            except Exception as error:
                failed = failed or str(error)
    if raster is None:
        return Compared(path, kind, SECOND if others else REFUSED, reason)
    if not others:
        return Compared(path, kind, FIRST, failed or "no second reader is installed")
    turned = [upright for other in others for upright in (other, turn_upright(other, raster.orientation))]
    outcomes = [_difference(raster, other) for other in turned]
    order = [EQUAL, ROUNDED, DIFFERENT]
    return Compared(path, kind, *min(outcomes, key=lambda outcome: order.index(outcome[0])))


def _difference(raster: Raster, other: Pixels) -> tuple[str, str]:
    """Outcome and reason; where a pixel is transparent, its colour means nothing."""
    ours, other = _in_colours(raster.pixels), _in_colours(other)
    if ours.shape != other.shape:
        sizes = [" x ".join(map(str, pixels.shape[:2])) for pixels in (ours, other)]
        return DIFFERENT, f"{sizes[0]} pixels, {sizes[1]} by the second reader"
    if raster.alpha is not None:
        ours, other = ours[raster.alpha > 0], other[raster.alpha > 0]
    a, b = _same_bits(ours, other)
    if np.array_equal(ours, other) or np.array_equal(a, b):
        return EQUAL, ""
    distance = np.abs(a.astype(np.float64) - b.astype(np.float64))
    reason = f"by {distance.max():.0f} at most, {distance.mean():.2f} in the mean"
    return ROUNDED if distance.max() <= ROUNDING or (distance > 3 * ROUNDING).mean() < 0.01 else DIFFERENT, reason


def _in_colours(pixels: Pixels) -> Pixels:
    """``[H, W, 3]`` of any channels."""
    pixels = np.squeeze(pixels) if pixels.ndim > 3 else pixels
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 2, 3, 4) and pixels.shape[0] in (1, 2, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        grey = pixels if pixels.ndim == 2 else pixels[..., 0]
        pixels = np.repeat(grey[..., None], 3, axis=2)
    return pixels[..., :3].astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels[..., :3]


def _same_bits(a: Pixels, b: Pixels) -> tuple[Pixels, Pixels]:
    """Of unsigned samples, the upper bits where one has more, or has the others moved up."""
    if a.dtype == np.uint16 and b.dtype == np.uint8:
        return (a >> 8).astype(np.uint8), b
    if b.dtype == np.uint16 and a.dtype == np.uint8:
        return a, (b >> 8).astype(np.uint8)
    if a.dtype == b.dtype == np.uint16 and 0 < int(b.max(initial=0)) < 2**12:
        bits = int(b.max()).bit_length()
        return a >> (16 - bits), b
    return a, b


def pictures(folders: tuple[Path, ...]) -> Iterator[Path]:
    suffixes = tuple(suffix for suffix in SUFFIXES if suffix not in SUFFIXES_MEDICAL)
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*") if path.name.lower().endswith(suffixes) and path.is_file())


def table(found: list[Compared]) -> str:
    """Markdown: a row a kind of file, a column an outcome."""
    outcomes = (EQUAL, ROUNDED, REFUSED, FIRST, SECOND, DIFFERENT)
    counts = Counter((one.kind, one.outcome) for one in found)
    rows = [f"| files | {' | '.join(outcomes)} |", "|---" * (len(outcomes) + 1) + "|"]
    for kind in dict.fromkeys(one.kind for one in sorted(found, key=lambda one: one.kind)):
        rows.append(f"| {kind} | {' | '.join(str(counts[kind, outcome]) for outcome in outcomes)} |")
    return "\n".join(rows)


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    """Print a table of all pictures below FOLDERS, and the reason of each that is not equal."""
    packages = (Path(sysconfig.get_path("purelib")),)
    found = [one for path in pictures(folders or packages) if (one := compare(path)) is not None]
    click.echo(table(found) + "\n")
    unexplained = 0
    for one in found:
        if one.outcome in (EQUAL, ROUNDED):
            continue
        known = next((reason for name, reason in REASONS.items() if re.fullmatch(name, one.path.name)), "")
        unexplained += one.outcome in (SECOND, DIFFERENT) and not known
        click.echo(f"{one.outcome}: {one.kind} {one.path.name}: {f'{known} ({one.reason})' if known else one.reason}")
    click.echo(f"\n{unexplained} of {len(found)} differ without a known reason")
    sys.exit(unexplained > 0)


if __name__ == "__main__":
    main()
