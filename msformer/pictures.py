"""Pictures of label maps: colours, overlays, contact sheets.

Label k has the same colour in every picture. The first eight are the colours of Okabe and Ito, told apart also with
colour vision deficiency; the following ones step around the colour circle by the golden angle, alternating light and
dark.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageFilter
from PIL.PngImagePlugin import PngImageFile, PngInfo

from msformer.output import SIGNATURE, complete_file
from msformer.scoring import Mask
from msformer.text import visible

OKABE_ITO = ("#56b4e9", "#d55e00", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#e69f00", "#999999")
ROWS_PER_SHEET = 6
TALLEST = 9.0
"""Inches that a row of a contact sheet is high at most; its pictures are 3 wide."""
LARGEST = 1320
"""Pixels of a side of what is drawn there, at least half of that: four times what is seen."""
BAND = 1 << 22
"""Pixels that are tinted at a time."""


def palette(count: int = 256) -> NDArray[np.uint8]:
    """Colours of the labels 0 to count - 1, ``[count, 3]``."""
    colours = [tuple(bytes.fromhex(code[1:])) for code in OKABE_ITO[:count]]
    for k in range(len(colours), count):
        lightness, saturation = ((0.42, 0.75), (0.68, 0.60), (0.30, 0.55))[k % 3]
        red, green, blue = colorsys.hls_to_rgb(k * 0.61803398875 % 1, lightness, saturation)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colours, dtype=np.uint8)


def colour_labels(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """Label map ``[H, W]`` -> ``[H, W, 3]``."""
    return palette(int(labels.max()) + 1)[labels]


def borders(labels: NDArray[Any], thickness: int = 1) -> NDArray[np.bool_]:
    """Pixels whose label differs from that of a neighbour less than `thickness` pixels to the right or below."""
    edge = np.zeros(labels.shape, dtype=np.bool_)
    for shift in range(1, thickness + 1):
        edge[:-shift] |= labels[shift:] != labels[:-shift]
        edge[:, :-shift] |= labels[:, shift:] != labels[:, :-shift]
    return edge


def drawable_borders(labels: NDArray[Any], thickness: int) -> NDArray[np.bool_]:
    """Borders, without those inside fine textures of alternating labels, which lines would cover altogether."""
    edge = borders(labels, thickness)
    density = PILImage.fromarray(edge.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(5 * thickness))
    return edge & (np.asarray(density) < 0.55 * 255)


def line_width(shape: tuple[int, ...]) -> int:
    """Of borders that look alike at every image size."""
    return max(1, round(min(shape[:2]) / 300))


def overlay(image: NDArray[np.uint8], labels: NDArray[Any], strength: float = 0.38) -> NDArray[np.uint8]:
    """An image ``[H, W, 3]`` tinted with the colours of its labels, white lines around its segments."""
    tinted = np.empty_like(image)
    step = max(1, BAND // max(1, image.shape[1]))
    colours = palette(int(labels.max()) + 1)
    for top in range(0, image.shape[0], step):
        rows = slice(top, top + step)
        tinted[rows] = (image[rows] * (1 - strength) + colours[labels[rows]] * strength).round()
    tinted[drawable_borders(labels, line_width(image.shape))] = 255
    return tinted


def outline(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int] = (0, 255, 120)
) -> NDArray[np.uint8]:
    """An image with the border of a mask drawn in."""
    drawn = image.copy()
    drawn[borders(mask, line_width(image.shape) + 1)] = colour
    return drawn


def shaded(image: NDArray[np.uint8], mask: Mask) -> NDArray[np.uint8]:
    """An image ``[H, W, 3]``, darker where the mask is not."""
    return np.where(mask[..., None], image, image // 3).astype(np.uint8)


def indexed_png(labels: NDArray[Any]) -> PILImage.Image:
    """A label map as an image whose pixel values are the labels: 8 bit with the palette, 16 bit grey above 256 labels.

    Raises:
        ValueError: more than 65536 labels.
    """
    count = int(labels.max()) + 1
    if count > 65536:
        raise ValueError(f"labels: {count} are too many for a PNG, which holds 65536")
    if count > 256:
        return PILImage.fromarray(labels.astype(np.uint16))
    image = PILImage.fromarray(labels.astype(np.uint8), mode=None)
    image.putpalette(palette().tobytes())
    return image


def write_png(picture: PILImage.Image, path: Path, optimize: bool = False) -> None:
    """Whole or not at all.

    Raises:
        OutputError: it cannot be written. (An encoder that writes to the disk itself would not say that it is full.)
    """
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=optimize, pnginfo=_signature())
    with complete_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _signature() -> PngInfo:
    """By which later runs tell results from images."""
    found = PngInfo()
    found.add_text(*SIGNATURE)
    return found


def read_labels(path: Path) -> NDArray[Any]:
    """The label map of an indexed PNG that `write_png` wrote, however large it is."""
    with PngImageFile(path) as image:  # `PIL.Image.open` refuses what is large, for it might come from a stranger
        return np.asarray(image)


def picture_url(pixels: NDArray[np.uint8]) -> str:
    """A picture as text that stands in a page itself."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="WEBP", quality=75, method=2)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class SheetRow:
    """One image of a contact sheet."""

    name: str
    caption: str
    image: NDArray[np.uint8]
    labels: NDArray[Any]
    mask: Mask | None = None
    """Its border is drawn into the first picture."""
    found: Mask | None = None
    """What was found without the mask: drawn in place of the overlay, with the border of the mask."""


def _shortened(name: str, most: int = 40) -> str:
    """A name whose middle is left out if it is long, so that it fits above its picture."""
    return name if len(name) <= most else f"{name[: most // 2]}\u2026{name[-(most // 2) :]}"


def small_row(
    name: str,
    caption: str,
    image: NDArray[np.uint8],
    labels: NDArray[Any],
    mask: Mask | None,
    found: Mask | None = None,
    *,
    largest: int = LARGEST,
) -> SheetRow:
    """A row whose pictures are no larger than what is seen of them: at most `largest` pixels a side."""
    step = -(-max(labels.shape) // largest)
    if step > 1:
        size = labels.shape[1] // step or 1, labels.shape[0] // step or 1
        image = np.asarray(PILImage.fromarray(image).resize(size, PILImage.Resampling.BOX))
        labels = _nearest(labels, image.shape)
        mask, found = (None if each is None else _nearest(each, image.shape) for each in (mask, found))
    return SheetRow(name, caption, image, labels, mask, found)


def _nearest(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(shape[:2], values.shape, strict=True))
    return values[np.ix_(rows, columns)]


def row_pictures(row: SheetRow) -> tuple[NDArray[np.uint8], ...]:
    """The three pictures of a row, ``[H, W, 3]``: the image, the overlay or the mask that was found, the label map."""

    def bordered(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return image if row.mask is None else outline(image, row.mask)

    middle = overlay(row.image, row.labels) if row.found is None else bordered(shaded(row.image, row.found))
    return bordered(row.image), middle, colour_labels(row.labels)


def contact_sheet(rows: Sequence[SheetRow], path: Path, border: str = "true border") -> None:
    """Draws one page, a row an image: the image, the overlay or the mask that was found, the label map; as PNG.

    `border` is what that of the masks is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from msformer.drawing import drawn, quiet_fonts

    heights = [min(3 * row.image.shape[0] / row.image.shape[1], TALLEST) for row in rows]
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.03, hspace=0.01, wspace=0.01)
    figure = Figure(figsize=(9.6, sum(heights) + 0.42 * len(rows) + 0.4), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 3, squeeze=False, height_ratios=heights)
    for row, (left, middle, right) in zip(rows, axes, strict=True):
        for axis, pixels in zip((left, middle, right), row_pictures(row), strict=True):
            axis.imshow(pixels, interpolation="antialiased")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        left.set_title("", fontsize=10, fontweight="bold", loc="left").set(**drawn(_shortened(visible(row.name))))
        right.set_title(row.caption, fontsize=10, loc="right", color="#444444")
    first = "image" if rows[0].mask is None else f"image, {border} in green"
    second = "overlay" if rows[0].found is None else "mask, the rest darkened"
    for axis, title in zip(axes[-1], [first, second, "labels"], strict=True):
        axis.set_xlabel(title, fontsize=9, color="#444444")
    buffer = io.BytesIO()
    with quiet_fonts():
        figure.savefig(buffer, dpi=110, format="png", metadata=dict([SIGNATURE]))
    path.write_bytes(buffer.getvalue())
