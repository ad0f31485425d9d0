"""Trained models as methods of an evaluation: ``MODEL/``, and ``MODEL/:net``, its network alone.

``MODEL/`` is scored as `msformer segment --model MODEL/ --mask` makes its masks, ``MODEL/:net`` as the network alone.
The blind score is that of the model's mask; no rule of the evaluation has a say. The other scores see the mask as two
labels, or the clusters of a model that knows clusters.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from msformer.baselines import LabelMap, Method, Task, all_methods
from msformer.training.predict import Gate, predict
from msformer.training.saved import TrainedModel, load

TITLES: dict[Gate, str] = {"fused": "", "net": ", net alone"}
ORDER = 20
"""After all methods that were not trained: a table compares with the last one."""


def is_model(name: str) -> bool:
    """Whether the name of a method means the folder of a trained model."""
    known = {"all", *(method.name for method in all_methods())}
    return name not in known and (Path(_split(name)[0]).is_dir() or "/" in name)


def model_method(name: str, device: str) -> Method:
    """The method of a name as on the command line, its network on a device.

    Raises:
        FileNotFoundError, ValueError: as `msformer.load`; or a part of a model that knows clusters.
    """
    path, gate = _split(name)
    model = load(path, device=device)
    if gate != "fused" and model.objective != "teacher":
        raise ValueError(f"methods: {name}: the model knows clusters (objective {model.objective}), and has no parts")
    ending = "" if gate == "fused" else f"-{gate}"
    return Method(
        name=f"model-{Path(path).resolve().name}-{model.digest[:8]}{ending}",
        title=f"{Path(path)}{TITLES[gate]}",
        order=ORDER,
        label_map=partial(label_map, model=model, gate=gate),
        tables=(),
        settings=model.digest,
    )


def model_methods(names: Iterable[str], device: str) -> tuple[Method, ...]:
    """The methods of some names, in their order, each once."""
    found = [model_method(name, device) for name in names]
    return tuple({method.name: method for method in found}.values())


def label_map(task: Task, model: TrainedModel, gate: Gate) -> LabelMap:
    """What the model says of an image."""
    found = predict(model, task.image, gate=gate)
    labels = found.mask.astype(np.uint8) if model.objective == "teacher" else found.labels
    return LabelMap(labels, mask=found.mask)


def _split(name: str) -> tuple[str, Gate]:
    """Folder and part."""
    return (name.removesuffix(":net"), "net") if name.endswith(":net") else (name, "fused")
