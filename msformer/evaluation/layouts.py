"""Where data sets keep images and masks.

- ``ph2``: ``IMDxxx/IMDxxx_Dermoscopic_Image/IMDxxx.bmp`` with ``IMDxxx/IMDxxx_lesion/IMDxxx_lesion.bmp``.
- ``lung``: ``2d_images/*.tif`` (Hounsfield units) with ``2d_masks/`` of the same names ("Finding and Measuring Lungs
  in CT Data").
- ``isic``: ``*.jpg`` with ``*_Segmentation.png``, in one folder or in two.
- ``pairs``: a folder ``images`` with a folder ``masks``, of the same names without suffix, or with an ending such as
  ``_mask``; or any two folders or files; or images and masks with such an ending in one folder.

Names are compared without regard to upper and lower case, and to how accents are encoded.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from msformer.io.files import find_images, plain_name
from msformer.io.medical import count_slices, is_medical, slices_with_labels
from msformer.output import printable

LUNG_WINDOW = (-512.0, 512.0)
"""Hounsfield units that become black and white."""
IMAGE_FOLDERS = ("images", "image", "imgs", "2d_images")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ground_truth", "2d_masks")
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

    def files(self, folder: Path, *exclude: Path) -> list[Path]:
        """The images below a folder."""
        return find_images([folder], exclude=(*self.exclude, *exclude))


def find_cases(data: Path, layout: str = "auto", masks: Path | None = None, exclude: tuple[Path, ...] = ()) -> Found:
    """The images below a folder and their masks.

    Args:
        data: a folder, or with `masks` an image.
        layout: ``"auto"``, or a key of `LAYOUTS`.
        masks: a folder or file of masks, for layout ``pairs``.
        exclude: folders to leave out, such as that of the results.

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
        found = Found(name, *_split(LAYOUTS[name](Source(data, masks, exclude))))
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
            yield f"{missing[0]}: missing" if missing else Case(name, image, mask)


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
    yield from _side_by_side(pictures, source.data, ("_segmentation",))


def _pairs(source: Source) -> Iterator[Case | str]:
    if source.masks is not None:
        yield from _paired(source, source.data, source.masks)
        return
    options = [[_below(source.data, name) for name in names] for names in (IMAGE_FOLDERS, MASK_FOLDERS)]
    images, masks = (next((folder for folder in folders if folder.is_dir()), source.data) for folders in options)
    yield from _paired(source, images, masks)


def _paired(source: Source, images: Path, masks: Path) -> Iterator[Case | str]:
    """Of two files, of two folders, of which one may lie in the other, or of one that holds both."""
    same = images.resolve() == masks.resolve()
    if same and images.is_file():
        yield f"{images}: has no mask"
    elif same:
        yield from _side_by_side(source.files(images), images, MASK_ENDINGS)
    elif images.is_file() and masks.is_file():
        yield from _slices(Case(plain_name(images), images, masks))
    else:
        pictures, labels = source.files(images, *_inside(images, masks)), source.files(masks, *_inside(masks, images))
        yield from _matched(pictures, labels, (images, masks))


def _inside(outer: Path, inner: Path) -> list[Path]:
    return [inner] if inner.resolve().is_relative_to(outer.resolve()) else []


def _side_by_side(files: list[Path], folder: Path, endings: tuple[str, ...]) -> Iterator[Case | str]:
    """Images and masks in one folder, told apart by the ends of their names; nothing if there is no mask."""
    groups: dict[bool, list[Path]] = {False: [], True: []}
    for file in files:
        groups[_key(plain_name(file)).endswith(endings)].append(file)
    if groups[True]:
        yield from _matched(groups[False], groups[True], (folder, folder))


def _slices(case: Case) -> Iterator[Case | str]:
    """Of a volume, the slices with a mask; any other case as it is."""
    try:
        counts = count_slices(case.mask), count_slices(case.image)
        found = slices_with_labels(case.mask) if counts[0] > 1 else []
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if counts[0] != counts[1]:
        yield f"{case.mask}: the number of slices of the mask is {counts[0]}, that of the image {counts[1]}"
    elif counts[0] == 1:
        yield case
    elif found:
        for index in found:
            yield replace(case, name=f"{case.name}-slice-{index:03d}", slice_index=index)
    else:
        yield f"{case.mask}: the mask is empty"


def _matched(images: list[Path], masks: list[Path], roots: tuple[Path, Path]) -> Iterator[Case | str]:
    """Images and the masks of the same name, or of the same name with an ending; `roots` are the folders that both
    were found in.

    Of several masks, that in the subfolder of the same name is taken, then that whose name is the same to the letter.
    Images of one name in several subfolders are named with these.
    """
    plain = [plain_name(image) for image in images]
    own = {_key(name) for name in plain}
    same = _by_key(masks, ())
    ended = _by_key([mask for mask in masks if _key(plain_name(mask)) not in own], MASK_ENDINGS)
    used: set[Path] = set()
    for image, name in zip(images, plain, strict=True):
        place = _subfolder(image, roots[0])
        unique = plain.count(name) == 1
        candidates = same.get(_key(name)) or ended.get(_key(name), [])
        used.update(candidates)
        candidates = [mask for mask in candidates if _key(_subfolder(mask, roots[1])) == _key(place)] or candidates
        candidates = [mask for mask in candidates if _exact(plain_name(mask)) == _exact(name)] or candidates
        if len(candidates) > 1:
            yield f"{image}: has several masks: {', '.join(map(str, candidates))}"
        elif candidates:
            yield from _slices(Case(name if unique or not place else f"{place}/{name}", image, candidates[0]))
        else:
            yield f"{image}: has no mask"
    for mask in masks:
        if mask not in used:
            yield f"{mask}: has no image"


def _subfolder(file: Path, root: Path) -> str:
    """In which of the root's subfolders a file lies; "" for none."""
    folder = file.parent.relative_to(root) if file.parent.is_relative_to(root) else Path()
    return printable("" if folder == Path() else folder.as_posix())


def _by_key(masks: list[Path], endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """Masks by the name of their image: their own, or where endings are given, theirs without one of them."""
    found: dict[str, list[Path]] = {}
    for mask in masks:
        key = _key(plain_name(mask))
        keys = [key.removesuffix(ending) for ending in endings if key.endswith(ending)] if endings else [key]
        for name in keys:
            found.setdefault(name, []).append(mask)
    return found


LAYOUTS: dict[str, Callable[[Source], Iterator[Case | str]]] = {
    "ph2": _ph2,
    "lung": _lung,
    "isic": _isic,
    "pairs": _pairs,
}
