"""Where data sets keep images and masks.

- ``ph2``: ``IMDxxx/IMDxxx_Dermoscopic_Image/IMDxxx.bmp`` with ``IMDxxx/IMDxxx_lesion/IMDxxx_lesion.bmp``.
- ``lung``: ``2d_images/*.tif`` (Hounsfield units) with ``2d_masks/`` of the same names ("Finding and Measuring Lungs
  in CT Data").
- ``isic``: ``*.jpg`` with ``*_Segmentation.png``, in one folder or in two.
- ``pairs``: a folder ``images`` with a folder ``masks``, of the same names without suffix, or with an ending such as
  ``_mask``; or any two folders or files; or images and masks with such an ending in one folder; or such two folders
  for each image. Masks that differ in a number at their end, ``a_mask``, ``a_mask_1``, are parts of one; images that
  differ from their mask in four digits at their end, ``a_0000``, are channels.

Names are compared without regard to upper and lower case, and to how accents are encoded.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from msformer.evaluation.masks import Labels
from msformer.io.files import find_images, plain_name
from msformer.io.medical import count_slices, is_medical, slices_with_labels
from msformer.output import printable

LUNG_WINDOW = (-512.0, 512.0)
"""Hounsfield units that become black and white."""
IMAGE_FOLDERS = ("images", "image", "imgs", "2d_images", "imagestr", "imagests")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ground_truth", "groundtruth", "gt", "2d_masks")
MASK_FOLDERS_OF = {"imagestr": "labelstr", "imagests": "labelsts"}
"""Of some image folders, those of their masks."""
MASK_ENDINGS = ("_segmentation", "_mask", "_lesion", "_label", "_gt")


@dataclass(frozen=True)
class Case:
    """An image file and its mask."""

    name: str
    image: Path
    mask: Path
    window: tuple[float, float] | None = None
    """Values that become black and white; None: as `msformer.segment` takes the file."""
    slice_index: int | None = None
    """Of volumes and files with several frames, as `msformer.io.medical.read_slice` counts."""
    modality: str | None = None
    """Of the image, as DICOM abbreviates it; None: what its file says."""
    more_masks: tuple[Path, ...] = ()
    """Further parts of the object, which is all of them together."""
    labels: Labels = None
    """Which labels of the masks are the object, as `msformer.evaluation.masks` numbers them."""


@dataclass(frozen=True)
class Found:
    """The cases of a data set, and a line for each file that is not part of one."""

    layout: str
    cases: tuple[Case, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where is looked for images and masks."""

    data: Path
    masks: Path | None
    exclude: tuple[Path, ...]
    """Folders that are not looked into."""
    labels: Labels = None
    """As of a `Case`."""

    def files(self, folder: Path, *exclude: Path) -> list[Path]:
        """The images below a folder."""
        return find_images([folder], exclude=(*self.exclude, *exclude))


def find_cases(
    data: Path,
    layout: str = "auto",
    masks: Path | None = None,
    exclude: tuple[Path, ...] = (),
    labels: Labels = None,
) -> Found:
    """The images below a folder and their masks.

    Args:
        data: a folder, or with `masks` an image.
        layout: ``"auto"``, or a key of `LAYOUTS`.
        masks: a folder or file of masks, for layout ``pairs``.
        exclude: folders to leave out, such as that of the results.
        labels: which labels of the masks are the object, as `msformer.evaluation.masks` numbers them.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown layout, or no image with a mask.
    """
    for path in (data, masks):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout: unknown {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    if masks is not None:
        if layout not in ("auto", "pairs"):
            raise ValueError(f"masks: is for layout pairs, not {layout}")
        names = ["pairs"]
    else:
        names = list(LAYOUTS) if layout == "auto" else [layout]
    reasons: list[str] = []
    for name in names:
        found = Found(name, *_split(LAYOUTS[name](Source(data, masks, exclude, labels))))
        if found.cases:
            return found
        reasons += found.problems
    listed = f": {'; '.join(reasons[:5])}" if reasons else ""
    raise ValueError(f"{data}: no image with a mask in layout {' or '.join(names)}{listed}")


def _split(entries: Iterator[Case | str]) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Cases by name, and problems, of which a second case of the same name is one."""
    cases: dict[str, Case] = {}
    problems = []
    for entry in entries:
        if isinstance(entry, str):
            problems.append(printable(entry))
        elif _exact(entry.name) in cases:
            problems.append(printable(f"{entry.image}: an image of the same name is {cases[_exact(entry.name)].image}"))
        else:
            cases[_exact(entry.name)] = entry
    return tuple(sorted(cases.values(), key=lambda case: case.name)), tuple(problems)


def _exact(name: str) -> str:
    """A name in which accents as one letter or as two are the same."""
    return unicodedata.normalize("NFC", name)


def _key(name: str) -> str:
    """What names are compared by: upper and lower case are the same, too."""
    return _exact(name).casefold()


def _ph2(source: Source) -> Iterator[Case | str]:
    ending = "_dermoscopic_image"
    for folder in _folders(source.data):
        if folder.name.lower().endswith(ending):
            name = folder.name[: -len(ending)]
            parts = (folder.parent, folder.name, f"{name}.bmp"), (folder.parent, f"{name}_lesion", f"{name}_lesion.bmp")
            image, mask = (_below(*part) for part in parts)
            missing = [path for path in (image, mask) if not path.exists()]
            yield f"{missing[0]}: missing" if missing else Case(name, image, mask, labels=source.labels)


def _folders(top: Path) -> Iterator[Path]:
    """The folders below one, each once, those behind links, too."""
    seen: set[Path] = set()
    for path, names, _ in os.walk(top, followlinks=True):
        new = {name: Path(path, name).resolve() for name in sorted(names)}
        names[:] = [name for name, place in new.items() if place not in seen]
        seen.update(new.values())
        yield from (Path(path, name) for name in names)


def _below(folder: Path, *names: str) -> Path:
    """A path below a folder, whose parts may be there in upper or lower case."""
    for name in names:
        same = [entry for entry in folder.iterdir() if _key(entry.name) == _key(name)] if folder.is_dir() else []
        folder = same[0] if same else folder / name
    return folder


def _lung(source: Source) -> Iterator[Case | str]:
    images, masks = (_below(source.data, name) for name in ("2d_images", "2d_masks"))
    if images.is_dir() and masks.is_dir():
        for entry in _paired(source, images, masks):
            yield replace(entry, window=LUNG_WINDOW, modality="CT") if isinstance(entry, Case) else entry


def _isic(source: Source) -> Iterator[Case | str]:
    pictures = [file for file in source.files(source.data) if not is_medical(file)]
    yield from _side_by_side(source, source.data, pictures, ("_segmentation",))


def _pairs(source: Source) -> Iterator[Case | str]:
    if source.masks is not None:
        yield from _paired(source, source.data, source.masks)
        return
    images, masks = _two_folders(source.data)
    if images != source.data or masks != source.data:
        yield from _paired(source, images, masks)
        return
    each = [(folder, *_two_folders(folder)) for folder in _folders(source.data)]
    whole = [(folder, images, masks) for folder, images, masks in each if folder not in (images, masks)]
    for folder, images, masks in whole:
        yield from _folder_of_image(source, folder, images, masks)
    if not whole:
        yield from _paired(source, source.data, source.data)


def _two_folders(data: Path) -> tuple[Path, Path]:
    """Those of images and masks in a folder; itself for one that there is not."""
    images = next((path for name in IMAGE_FOLDERS if (path := _below(data, name)).is_dir()), data)
    names = [MASK_FOLDERS_OF[_key(images.name)]] if _key(images.name) in MASK_FOLDERS_OF else MASK_FOLDERS
    return images, next((path for name in names if (path := _below(data, name)).is_dir()), data)


def _folder_of_image(source: Source, folder: Path, images: Path, masks: Path) -> Iterator[Case | str]:
    """Of one image, or a part of the data set: where there is one image, all masks are parts of its mask."""
    try:
        pictures, parts = source.files(images), source.files(masks)
    except ValueError as error:
        yield str(error)
        return
    if len(pictures) == 1:
        name = printable(folder.relative_to(source.data).as_posix())
        yield from _slices(Case(name, pictures[0], parts[0], more_masks=tuple(parts[1:]), labels=source.labels))
    else:
        yield from _matched(source, pictures, parts, (images, masks))


def _paired(source: Source, images: Path, masks: Path) -> Iterator[Case | str]:
    """Of two files, of two folders, of which one may lie in the other, or of one that holds both."""
    same = images.resolve() == masks.resolve()
    if same and images.is_file():
        yield f"{images}: has no mask"
    elif same:
        yield from _side_by_side(source, images, source.files(images), MASK_ENDINGS)
    elif images.is_file() and masks.is_file():
        yield from _slices(Case(plain_name(images), images, masks, labels=source.labels))
    else:
        pictures, labels = source.files(images, *_inside(images, masks)), source.files(masks, *_inside(masks, images))
        yield from _matched(source, pictures, labels, (images, masks))


def _inside(outer: Path, inner: Path) -> list[Path]:
    return [inner] if inner.resolve().is_relative_to(outer.resolve()) else []


def _side_by_side(source: Source, folder: Path, files: list[Path], endings: tuple[str, ...]) -> Iterator[Case | str]:
    """Images and masks in one folder, told apart by the ends of their names; nothing if there is no mask."""
    groups: dict[bool, list[Path]] = {False: [], True: []}
    for file in files:
        groups[any(part.ending for part in _parts(file, endings))].append(file)
    if groups[True]:
        yield from _matched(source, groups[False], groups[True], (folder, folder))


def _slices(case: Case) -> Iterator[Case | str]:
    """Of a volume, the slices with a mask; any other case as it is."""
    masks = (case.mask, *case.more_masks)
    try:
        count, counts = count_slices(case.image), [count_slices(mask) for mask in masks]
        found = {index for mask in masks if counts[0] > 1 for index in slices_with_labels(mask, case.labels or ())}
    except (ValueError, OSError) as error:
        yield str(error)
        return
    wrong = next((i for i in range(len(masks)) if counts[i] != count), None)
    if wrong is not None:
        yield f"{masks[wrong]}: the number of slices of the mask is {counts[wrong]}, that of the image {count}"
    elif count == 1:
        yield case
    elif found:
        for index in sorted(found):
            yield replace(case, name=f"{case.name}-slice-{index:03d}", slice_index=index)
    else:
        yield f"{case.mask}: the mask is empty" + (" of these labels" if case.labels else "")


class _Part(NamedTuple):
    """What the name of a mask says: ``a_mask_2`` is the second part of the mask of ``a``."""

    image: str
    """The key of the image's name."""
    ending: str
    number: int | None
    file: Path


def _parts(file: Path, endings: Iterable[str]) -> list[_Part]:
    """What the name of a mask may mean; "" among the endings is for names with nothing but a number at their end."""
    key, found = _key(plain_name(file)), []
    for ending in endings:
        number = r"(?:[ _-]?\(?(\d+)\)?)?" if ending else r"[_-](\d+)"
        match = re.fullmatch(f"(.+){ending}{number}", key)
        if match:
            found.append(_Part(match[1], ending, int(match[2]) if match[2] else None, file))
    return found


def _matched(source: Source, images: list[Path], masks: list[Path], roots: tuple[Path, Path]) -> Iterator[Case | str]:
    """Images and the masks of the same name, or of the same name with an ending; `roots` are the folders that both
    were found in.

    Of several masks, those in the subfolder of the same name are taken, then those whose name is the same to the
    letter; those with one ending, numbered, belong together. Images of one name in several subfolders are named with
    these. Where a mask has the name of images but for four digits, these are the channels of one image, and the first
    is taken.
    """
    plain = [plain_name(image) for image in images]
    book = _Book(masks, {_key(name) for name in plain}, numbered=roots[0] != roots[1])
    channels: dict[str, Path] = {}
    for image, name in zip(images, plain, strict=True):
        place = _subfolder(image, roots[0])
        unique = plain.count(name) == 1
        found = book.masks_of(name, place, roots[1])
        channel = re.fullmatch(r"(.+)_\d{4}", name)
        if not found and channel:
            name = channel[1]
            found = book.masks_of(name, place, roots[1])
            first = channels.setdefault(f"{place}/{_key(name)}", image) if found else image
            if first != image:
                yield f"{image}: another channel of {first}"
                continue
        if not found:
            yield f"{image}: has no mask"
        elif isinstance(found, str):
            yield f"{image}: {found}"
        else:
            shown = name if unique or not place else f"{place}/{name}"
            yield from _slices(Case(shown, image, found[0], more_masks=tuple(found[1:]), labels=source.labels))
    for mask in masks:
        if mask not in book.used:
            yield f"{mask}: has no image"


class _Book:
    """Masks by the names of their images."""

    def __init__(self, masks: list[Path], images: set[str], numbered: bool) -> None:
        """`images` are the keys of all images; `numbered`: whether a number may end the name of a mask by itself."""
        self.used: set[Path] = set()
        self.same: dict[str, list[_Part]] = {}
        self.ended: dict[str, list[_Part]] = {}
        for mask in masks:
            key = _key(plain_name(mask))
            self.same.setdefault(key, []).append(_Part(key, "", None, mask))
            if key not in images:
                for part in _parts(mask, (*MASK_ENDINGS, "") if numbered else MASK_ENDINGS):
                    self.ended.setdefault(part.image, []).append(part)

    def masks_of(self, name: str, place: str, root: Path) -> list[Path] | str:
        """The parts of an image's mask; or what is wrong with them."""
        key = _key(name)
        whole, ended = self.same.get(key, []), self.ended.get(key, [])
        endless = [part for part in ended if not part.ending]
        parts = whole + endless if whole else [part for part in ended if part.ending] or endless
        self.used.update(part.file for part in parts)
        parts = [part for part in parts if _key(_subfolder(part.file, root)) == _key(place)] or parts
        same = [part for part in parts if _exact(plain_name(part.file)).startswith(_exact(name))]
        parts = sorted(same or parts, key=lambda part: (part.number is not None, part.number or 0, part.file.name))
        if len({(part.ending, part.number) for part in parts}) < len(parts) or len({p.ending for p in parts}) > 1:
            return f"has several masks: {', '.join(str(part.file) for part in parts)}"
        return [part.file for part in parts]


def _subfolder(file: Path, root: Path) -> str:
    """In which of the root's subfolders a file lies; "" for none."""
    folder = file.parent.relative_to(root) if file.parent.is_relative_to(root) else Path()
    return printable("" if folder == Path() else folder.as_posix())


LAYOUTS: dict[str, Callable[[Source], Iterator[Case | str]]] = {
    "ph2": _ph2,
    "lung": _lung,
    "isic": _isic,
    "pairs": _pairs,
}
