"""Training one network for folders of images, from files to a model: `train`."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import msformer
import msformer_kernels
from msformer.claim import claimed
from msformer.io.read import Reading
from msformer.machine import cores
from msformer.memory import kept_memory
from msformer.messages import tell, tell_at_end, warn
from msformer.model import MSFormer
from msformer.output import prepare_folder
from msformer.segmentation import find_device
from msformer.training import checkpoint
from msformer.training.batches import Batches
from msformer.training.checkpoint import State
from msformer.training.distributed import Processes, from_first, joined, started_again, wait_for_all
from msformer.training.folder import TEACHERS, Material, gather
from msformer.training.following import doubts, followed
from msformer.training.lessons import Pool
from msformer.training.objectives import Objective, find_objective
from msformer.training.report import REPORT, Facts, pictures, write_report
from msformer.training.rounds import taught_again
from msformer.training.saved import TrainedModel, load, save_model
from msformer.training.settings import PREDICTION_SIZE, STEPS, Settings
from msformer.training.stopping import Wish, stop_on_request
from msformer.training.trainer import AGREEMENT, Trainer, make_network
from msformer.training.watch import Watch
from msformer_kernels.core.backends import resolve

CHECKPOINT_EVERY = 100
"""Steps."""
CHECKPOINT_SECONDS = 60.0
"""After which there is another, where steps are long."""
REPORT_EVERY = 30.0
"""Seconds."""
GUESSED = "auto"
RECENT = 50
"""Steps whose mean is shown."""


def train(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    domain: str | None = None,
    objective: str = "teacher",
    weights: Mapping[str, float] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    batch: int = 8,
    accumulate: int = 1,
    precision: str = "float32",
    rounds: int = 1,
    learning_rate: float | None = None,
    embed_dim: int = 32,
    depth: int = 1,
    window: tuple[float, float] | None = None,
    slice_index: int | None = None,
    modality: str | None = None,
    all_slices: bool = False,
    device: str = "auto",
    backend: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainedModel:
    """Trains one network on folders of images, without masks, and writes it to a folder.

    Started again with the same arguments it goes on where it was stopped, in one process to the same bits. Under
    ``torchrun`` all processes share the work.

    Args:
        folders: folders of images, or files.
        out: folder for the model, its report, the checkpoint and what the teachers said.
        domain: a name in `msformer.training.domains.DOMAINS`; None: as most images look.
        objective: a name in `msformer.training.objectives.OBJECTIVES`.
        weights: of the terms of the objective, by name; those not given are as it says.
        steps: of each round.
        seed: of the initial weights, and of all that is drawn.
        batch: crops a step, of all processes together.
        accumulate: parts that each process splits its share of the batch in, to save memory.
        precision: ``"float32"`` or ``"bfloat16"`` (autocast).
        rounds: after the first, the network is taught by itself and its teachers.
        learning_rate: the highest; None: as the objective says.
        embed_dim, depth: of the `MSFormer`.
        window: the values that become black and white; None: what the file says, else the usual for its kind.
        slice_index: of volumes; None: the middle one.
        modality: of the images, as DICOM abbreviates it; None: what each file says, with the domain ``"ct"`` CT.
        all_slices: takes every slice of volumes as an image.
        device: ``"auto"`` (the GPU if there is one), or as in PyTorch.
        backend: of the kernels, see `msformer_kernels.use_backend`.
        workers: processes that read images at the same time; None: one a core.
        overwrite: starts anew, whatever is there.
        progress: prints how it goes.

    Raises:
        ValueError: a setting out of range, no usable image, a checkpoint of another training.
        OSError: a folder that cannot be read or written to.
        FloatingPointError: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything so far is kept.
    """
    paths = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    chosen = find_objective(objective, weights)
    out = Path(out)
    with joined(device) as processes, ExitStack() as alone:
        settings = settings_of(
            chosen,
            domain,
            learning_rate,
            _device(device, processes).type,
            backend,
            steps=steps,
            seed=seed,
            batch=batch,
            accumulate=accumulate,
            precision=precision,
            rounds=rounds,
            embed_dim=embed_dim,
            depth=depth,
        )
        settings.check_split(processes.count)
        if processes.first:
            alone.enter_context(claimed(out))
            prepare_folder(out / TEACHERS)
            if overwrite and not started_again():
                (out / checkpoint.CHECKPOINT).unlink(missing_ok=True)
        wait_for_all()
        read_early(out, settings)  # before minutes of teachers
        shown = progress and processes.first
        material = gather(
            paths,
            out,
            domain=domain,
            taught=chosen.taught,
            seed=seed,
            reading=reading_for(domain, window, slice_index, modality),
            all_slices=all_slices,
            workers=workers or _cores(),
            processes=processes,
            shown=shown,
        )
        settings = replace(settings, domain=material.domain.name)
        run = _Run(out, settings, chosen, material, _device(device, processes), processes, shown)
        with msformer_kernels.use_backend(settings.backend), kept_memory(), stop_on_request() as wish:
            run.all_rounds(wish)
        wait_for_all()
    model = load(out, device=device)
    for doubt in model.doubts if shown else ():
        warn(doubt)
    left_out, failed = len(material.disagreed), len(material.failures)
    counts = {"done": len(material.pool), "left_out": left_out, "failed": failed}
    tell_at_end(counts={"images": sum(counts.values())} | counts, out=out, training=model.training)
    return model


def settings_of(
    objective: Objective,
    domain: str | None,
    learning_rate: float | None,
    device: str,
    backend: str | None,
    **more: Any,
) -> Settings:
    """What was asked for, with what follows from the objective and the device; raises as `train` does."""
    return Settings(
        objective=objective.name,
        weights=objective.weights,
        domain=domain or GUESSED,
        learning_rate=objective.learning_rate if learning_rate is None else learning_rate,
        device=device,
        backend=resolve(backend, device, torch.float32),
        **more,
    )


def reading_for(
    domain: str | None, window: tuple[float, float] | None, slice_index: int | None, modality: str | None
) -> Reading:
    """How images are read: with the domain ``"ct"`` they are of CT."""
    return Reading(window, slice_index, modality or ("CT" if domain == "ct" else None))


def read_early(out: Path, settings: Settings) -> State | None:
    """The checkpoint of a training with these settings, before its images are known, of which the domain may be
    guessed; raises ValueError for one with others."""
    return checkpoint.read(out, {name: value for name, value in _record(settings).items() if name != "domain"})


class _Run:
    """A training and its files."""

    def __init__(
        self,
        out: Path,
        settings: Settings,
        objective: Objective,
        material: Material,
        device: torch.device,
        processes: Processes,
        shown: bool,
    ) -> None:
        self.out, self.settings, self.objective, self.material = out, settings, objective, material
        self.device, self.processes, self.shown = device, processes, shown
        record = {**_record(settings), "sight": material.domain.sight.name}
        images = {name: lesson.key for name, lesson in material.lessons.items()}
        other = list(checkpoint.differences(from_first(lambda: (record, images)), (record, images)))
        if other:
            differs = "; ".join(other)
            raise ValueError(f"process {processes.rank} has other settings or images than the first: {differs}")
        self.state = checkpoint.read(out, record, images) or State(record, images)
        if self.state.round > settings.rounds:
            raise ValueError(
                f"rounds: {out} is in round {self.state.round}, expected as many at least, got {settings.rounds}; take "
                "another folder, or --overwrite to train anew"
            )
        if self.state.complete and self.state.round < settings.rounds:
            self._next_round()
        self.kept = self.reported = time.monotonic()
        self.followed: float | None = None
        """How well the network follows its teachers, once it is trained."""

    def all_rounds(self, wish: Wish) -> None:
        """Takes all steps that are left, and writes the model."""
        done = self._steps_before() + self.state.step
        with Watch("step", self.settings.steps * self.settings.rounds, done, self.shown) as watch:
            for warning in self.material.warnings:
                watch.warn(warning)
            watch.say(
                f"{len(self.material.pool)} images, domain {self.material.domain.name}, objective "
                f"{self.objective.name}; {REPORT} in {self.out} shows how it goes"
            )
            if done:
                watch.say(f"goes on after step {done}")
            tell("start", images=len(self.material.pool), out=self.out, settings=_record(self.settings), done=done)
            if self.state.complete and not from_first(self._has_results):
                self._write_results(self._finished_network(), self._pool(watch))
            while not self.state.complete:
                self._round(watch, wish)

    def _round(self, watch: Watch, wish: Wish) -> None:
        """The steps that are left of the round that the state is in, and what follows them."""
        pool = self._pool(watch)
        trainer = Trainer(self.settings, self.objective, self.state, self.device, self.processes)
        batches = Batches(
            pool,
            self.material.domain.strengths,
            self.material.domain.sight,
            seed=self.settings.seed + self.state.round - 1,
            batch=self.settings.batch,
            sizes=self.settings.sizes,
            views=self.objective.views,
            device=self.device,
            share=(self.processes.rank, self.processes.count),
        )

        def each(state: State) -> bool:
            watch.update(self._steps_before() + state.step, self._line())
            if self.processes.first:
                now = time.monotonic()
                if state.step % CHECKPOINT_EVERY == 0 or now - self.kept > CHECKPOINT_SECONDS:
                    self._keep(trainer.snapshot())
                if now - self.reported > REPORT_EVERY:
                    self._report(trainer.network, pool)
            return wish.asked

        finished = trainer.run(batches, each)
        trainer.snapshot()
        if finished:
            self._next_round()
        if self.state.complete:
            self._write_results(trainer.network, pool)
        if self.processes.first:
            self._keep(self.state)  # says that all is there, if that is so
            if not self.state.complete:
                self._report(trainer.network, pool)
        if not finished:
            raise KeyboardInterrupt

    def _keep(self, state: State) -> None:
        checkpoint.write(state, self.out)
        self.kept = time.monotonic()

    def _write_results(self, network: MSFormer, pool: Pool) -> None:
        if self.processes.first:
            if self.objective.taught:
                self.followed = followed(network, pool, self.material.domain.sight)
            self._save(network)
            self._report(network, pool)

    def _has_results(self) -> bool:
        """Whether the model is there and whole, and its report is there."""
        try:
            load(self.out, device="cpu")
        except (ValueError, OSError):
            return False
        return (self.out / REPORT).exists()

    def _finished_network(self) -> MSFormer:
        network = make_network(self.settings, self.objective, self.device)
        network.load_state_dict(self.state.network or {})
        return network

    def _doubts(self) -> list[str]:
        if self.followed is None:
            return []
        kinds = [lesson.kind for lesson in self.material.lessons.values()]
        return list(doubts(self.followed, self.material.domain, kinds, self.settings.steps))

    def _next_round(self) -> None:
        self.state.complete = self.state.round >= self.settings.rounds
        if not self.state.complete:
            self.state.round += 1
            self.state.step = 0
            self.state.optimizer = None
            self.state.teacher = self.state.network

    def _pool(self, watch: Watch) -> Pool:
        """The images and targets of the round."""
        if self.state.round == 1:
            return self.material.pool
        teacher = make_network(self.settings, self.objective, self.device)
        teacher.load_state_dict(self.state.teacher or {})

        def make() -> Pool:
            material = self.material
            return taught_again(teacher, material.pool, material.lessons, material.domain)

        pool = from_first(make)
        watch.say(f"round {self.state.round}: {len(pool)} images on which the network and its teachers agree")
        return pool

    def _steps_before(self) -> int:
        return (self.state.round - 1) * self.settings.steps

    def _recent(self, name: str) -> float:
        return float(np.mean(self.state.history.get(name, [])[-RECENT:] or [0.0]))

    def _line(self) -> str:
        """How it goes, in a line."""
        loss = sum(self.objective.weights[name] * self._recent(name) for name in self.objective.used)
        parts = [f"loss {loss:.3f}"]
        if self.objective.taught:
            parts.append(f"agreement {100 * self._recent(AGREEMENT):.1f} %")
        return ", ".join([*parts, f"data {self._data_share():.0f} % of the time"])

    def _data_share(self) -> float:
        return 100 * self.state.waited / self.state.seconds if self.state.seconds else 0.0

    def _processes(self) -> str:
        return "1 process" if self.processes.count == 1 else f"{self.processes.count} processes"

    def _report(self, network: MSFormer, pool: Pool) -> None:
        state, material = self.state, self.material
        domain = f"{material.domain.name}{', guessed' if material.guessed else ''}"
        by_command = click.get_current_context(silent=True) is not None
        about = {
            "started with": shlex.join(["msformer", *sys.argv[1:]]) if by_command else "msformer.train, in Python",
            "images": f"{len(material.pool)}, {len(material.disagreed)} left out whose teachers disagree",
            "domain": domain,
            "objective": self.objective.name,
            "step": f"{state.step} of {self.settings.steps}, round {state.round} of {self.settings.rounds}",
            "now": self._line(),
            "time": f"{state.seconds:.0f} s",
            "machine": f"{platform.platform()}, torch {torch.__version__}, {self.device}, {self._processes()}",
        }
        facts = Facts(about, [*material.warnings, *self._doubts()], state.complete)
        write_report(self.out, facts, state.history, pictures(network, pool, material.domain.sight))
        self.reported = time.monotonic()

    def _save(self, network: MSFormer) -> None:
        training = {
            **self.material.facts(),
            "final loss of each term": {name: self._recent(name) for name in self.objective.used},
            "final agreement with the targets": self._recent(AGREEMENT) if self.objective.taught else None,
            "settings": self.settings.record(),
            "seconds": round(self.state.seconds, 1),
            "processes": self.processes.count,
            "machine": f"{platform.platform()}, torch {torch.__version__}",
            "warnings": list(self.material.warnings),
            "median agreement with the targets, whole images": self.followed,
            "doubts": self._doubts(),
        }
        save_model(
            self.out,
            network,
            domain=self.material.domain.name,
            objective=self.objective.name,
            size=PREDICTION_SIZE,
            training=training,
        )


def _record(settings: Settings) -> dict[str, Any]:
    """What a checkpoint has to be of. Rounds may differ, as a training may be given more of them afterwards."""
    record = {**settings.record(), "version": msformer.__version__}
    del record["rounds"]
    return record


def _device(device: str, processes: Processes) -> torch.device:
    """Of several processes on a machine with GPUs, each has its own."""
    found = find_device(device)
    return torch.device("cuda", processes.local_rank) if found.type == "cuda" and processes.count > 1 else found


def _cores() -> int:
    """Cores for this process, of those that it may run on."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
