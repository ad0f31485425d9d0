"""The model card: what a person should know of a trained model, from the facts that are saved with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msformer.output import complete_file, printable
from msformer.training.sight import find_sight

_CARD = """\
# A segmentation model of msformer, trained without masks

A small MS-Former for images of the kind **{domain}**. No mask was used to train it: {teaching}.

```console
$ msformer segment FOLDER --model {argument} --mask --out RESULTS
```

```python
import msformer

model = msformer.load({folder!r})
```

Use it for images like those that it was trained on: the same kind, the same kind of device. Look at the contact sheets
before you rely on a mask; the record of each image says how sure the network was. It is no medical device, and nothing
here was tested for diagnosis.

## Network

MS-Former, {parameters:,} weights, width {embed_dim}, {depth} block{plural} in each branch, {num_clusters} labels.
Images are resized to {size} x {size} pixels, and {sight}.

## Training

{training}
## Format

`model.safetensors` and `model.json`, format {format}, written by msformer {version}.
SHA-256 of the weights: `{sha256}`.
"""

_TEACHING = {
    "teacher": "it learned where several rules, on simple label maps of each image, agree on the object",
    "consistency": "it learned labels that stay the same when the colours of an image change",
    "published": "it learned by the losses of MS-Former, on batches of images",
}


def write_card(path: Path, description: Mapping[str, Any], parameters: int) -> None:
    """Writes the card of a model as Markdown.

    Args:
        description: what ``model.json`` is going to hold.
        parameters: weights of the network.
    """
    architecture, folder = description["architecture"], path.absolute().parent.name
    text = _CARD.format(
        domain=description["domain"],
        teaching=_TEACHING[description["objective"]],
        folder=folder,
        argument=shlex.quote(folder),
        parameters=parameters,
        embed_dim=architecture["embed_dim"],
        depth=architecture["depth"],
        plural="" if architecture["depth"] == 1 else "s",
        num_clusters=architecture["num_clusters"],
        size=description["preprocessing"]["size"],
        sight=find_sight(description["preprocessing"]["sight"]).words,
        training="".join(_facts(description["training"])),
        format=description["format"],
        version=description["version"],
        sha256=description["sha256"],
    )
    with complete_file(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


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
