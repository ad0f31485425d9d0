"""The model card: what a person should know of a trained model, from the facts that are saved with it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msformer.text import printable
from msformer.training.sight import find_sight

_CARD = """\
{front}
# A segmentation model of msformer, trained without masks

A small MS-Former for images of the kind **{domain}**. No mask was used to train it: {teaching}.

## How to use it

```console
$ pip install "msformer[segment]"
$ msformer segment FOLDER --model {argument} --mask --out RESULTS
```

```python
import msformer

model = msformer.load({folder!r})  # or ORG/NAME of the Hugging Face Hub, with msformer[hub]
found = model.predict("image.png")
found.mask, found.probability, found.confidence
```

## Limits

Use it for images like those that it was trained on: the same kind, the same kind of device. Look at the contact sheets
before you rely on a mask; the record of each image says how sure the network was. It is no medical device, and nothing
here was tested for diagnosis.
{doubts}
## How good it is

No true mask was there to compare with, so this card has no score of accuracy. Where there are masks,

```console
$ msformer evaluate --data DIR --methods {argument}/ --out REPORT
```

measures it. What the training itself tells is how far teachers and network agree, as Dice coefficients from 0 to 1:

{agreement}
## Network

MS-Former, {parameters:,} weights, width {embed_dim}, {depth} block{plural} in each branch, {num_clusters} labels.
Images are resized to {size} x {size} pixels, and {sight}.

## Training

{training}
## Licence of the weights

{licence}

## Format

`model.safetensors` and `model.json`, format {format}, written by msformer {version}. No code, no pickles.
SHA-256 of the weights: `{sha256}`.
"""

_NETWORK_CARD = """\
{front}
# A network of msformer

MS-Former, {parameters:,} weights, width {embed_dim}, {depth} block{plural} in each branch, {num_clusters} labels,
{in_channels} input channels. What it was trained on, and how well it does, whoever saved it has not said here.

```python
import msformer

network = msformer.MSFormer.from_pretrained({folder!r})  # or ORG/NAME of the Hugging Face Hub, with msformer[hub]
logits = network(images, attention=False).logits  # images [B, {in_channels}, H, W], at least 33 x 33
```

## Licence of the weights

{licence}

## Format

`model.safetensors` and `config.json`. No code, no pickles.
"""

UNKNOWN = "unknown"
"""How the Hugging Face Hub calls a license that nobody has stated."""
_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
_STATED = "`{}`, as whoever saved it said."
_UNSTATED = (
    "Not stated. Whoever trained it decides, as far as the images allow: `model.save_pretrained(FOLDER, "
    'license="cc-by-4.0")` writes it here.'
)
_TAGS = ("msformer", "medical", "unsupervised", "efficient-attention")

_TEACHING = {
    "teacher": "it learned where several rules, on simple label maps of each image, agree on the object",
    "consistency": "it learned labels that stay the same when the colours of an image change",
    "published": "it learned by the losses of MS-Former, on batches of images",
}


def card(folder: Path, description: Mapping[str, Any], parameters: int) -> str:
    """The card of a trained model as Markdown, its front matter as the Hugging Face Hub reads it.

    Args:
        folder: of the model.
        description: what ``model.json`` is going to hold.
        parameters: weights of the network.

    Raises:
        ValueError: a license that is no identifier.
    """
    training = {**description["training"]}
    agreement = {name: value for name, value in training.items() if "agreement" in name and value is not None}
    doubts = [*training.pop("doubts", ()), *training.pop("warnings", ())]
    return _filled(
        _CARD,
        folder,
        license=description["license"],
        tags=(*_TAGS, description["domain"]),
        domain=description["domain"],
        teaching=_TEACHING[description["objective"]],
        parameters=parameters,
        **description["architecture"],
        size=description["preprocessing"]["size"],
        sight=find_sight(description["preprocessing"]["sight"]).words,
        doubts="".join(f"\n- {doubt}" for doubt in doubts) + "\n" if doubts else "",
        agreement="".join(_facts(agreement)) or "- nothing was recorded\n",
        training="".join(_facts({name: value for name, value in training.items() if name not in agreement})),
        format=description["format"],
        version=description["version"],
        sha256=description["sha256"],
    )


def network_card(folder: Path, architecture: Mapping[str, Any], parameters: int, license: str | None) -> str:
    """The card of a network of which nothing is known but its architecture; raises as `card` does."""
    return _filled(_NETWORK_CARD, folder, license=license, tags=_TAGS, parameters=parameters, **architecture)


def _filled(template: str, folder: Path, *, license: str | None, tags: Sequence[str], **values: Any) -> str:
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"license: expected an identifier such as mit or cc-by-4.0, got {license!r}")
    name = folder.absolute().name
    front = [
        *("---", "library_name: msformer", f"license: {license or UNKNOWN}", "pipeline_tag: image-segmentation"),
        *("tags:", *(f"- {tag}" for tag in tags), "---"),
    ]
    text = template.format(
        front="\n".join(front),
        folder=name,
        argument=shlex.quote(name),
        plural="" if values["depth"] == 1 else "s",
        licence=_STATED.format(license) if license else _UNSTATED,
        **values,
    )
    return printable(text)


def _facts(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A Markdown list, with lists in it for what has parts."""
    for name, value in facts.items():
        title = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield f"{indent}- {title}:\n"
            yield from _facts(value, f"{indent}  ")
        elif isinstance(value, list | tuple):
            yield f"{indent}- {title}: {', '.join(map(_shown, value)) or 'none'}\n"
        else:
            yield f"{indent}- {title}: {_shown(value)}\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
