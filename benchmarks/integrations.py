"""Models of other libraries with the fused operators in place, beside the same models as they are and compiled.

    python -m benchmarks.integrations --models "timm/pvt_v2_b0,denoising-diffusion/attention-*" --samples 5

Random weights, the same for the three; medians of times that take turns. A model whose library is not installed is
skipped. Two versions of transformers do not go into one environment: the models of version 4 come from a folder,

    pip install --no-deps --target transformers4 "transformers>=4.57,<5" "huggingface_hub<1" "tokenizers>=0.22,<0.23"
    python -m benchmarks.integrations --transformers-4 transformers4

Each row is written as soon as it is measured, as JSON, and the table as Markdown beside it. The same command goes on
where it was interrupted.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from msformer.output import OutputError, complete_file, prepare_folder, read_record, write_json

from .gpu.processes import worker_environment
from .integration_models import MODELS
from .integration_row import (
    BOTH,
    COMPILE,
    FAILED,
    FORWARD,
    MEASURED,
    ORIGINAL,
    PATCHED,
    TRAINING,
    IntegrationRow,
)
from .machine import Machine, describe
from .report import BUSY, size, where_lines
from .tables import duration, markdown_row

INTERRUPTED = 130
VERSION = 2
TRANSFORMERS_4 = "transformers-4/"
BOTH_OVER = "patched and compiled, over compile"
HEADER = (
    *("model", "inputs", "replaced", "left alone", "error"),
    *(FORWARD, "over original", "over compile", BOTH_OVER),
    *(TRAINING, "over original", "over compile", BOTH_OVER),
    "peak memory of training: original, compile, patched",
)
LEGEND = (
    "Times are medians in turns, of the patched model; 'over X' is the time of X divided by it: above 1, the patched "
    "model is faster. 'compile' is torch.compile of the original; the last of three is the time of that over that of "
    "torch.compile of the patched model. Forward is in evaluation mode, forward + backward in "
    "training mode. The error is the largest of the proofs, in float64. A block that was replaced contains its MixFFN."
)


@dataclass
class IntegrationResults:
    """All of a run."""

    machine: Machine
    samples: int
    rows: list[IntegrationRow]

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    def add(self, row: IntegrationRow) -> None:
        """In place of an earlier row of this model; in the order of the models."""
        rows = {known.model: known for known in (*self.rows, row)}
        self.rows = [rows[name] for name in MODELS if name in rows]


def earlier(path: Path, machine: Machine, samples: int) -> list[IntegrationRow]:
    """The rows of a file, measured in the same way; none if there is no file.

    Raises:
        ValueError: not such a file, or measured in another way.
    """
    if not path.exists():
        return []
    content = read_record(path)
    if content is None or content.get("version") != VERSION:
        raise ValueError(f"{path}: expected results of this program, version {VERSION}; give another --out")
    now = json.loads(json.dumps(asdict(machine))) | {"samples": samples}
    then = content["machine"] | {"samples": content["samples"]}
    other = [f"{key} {then.get(key)!r}, now {now[key]!r}" for key in now if key != "date" and then.get(key) != now[key]]
    if other:
        raise ValueError(f"{path}: measured with {'; '.join(other)}; give another --out")
    return [IntegrationRow.from_json(row) for row in content["rows"]]


def measured(
    name: str, samples: int, threads: int, compile_limit: float, transformers_4: Path | None
) -> IntegrationRow:
    """The row of a model, from a process of its own; failed if that ends without one."""
    environment = worker_environment({})
    if transformers_4 is not None and name.startswith(TRANSFORMERS_4):
        environment["PYTHONPATH"] = os.pathsep.join([str(transformers_4.resolve()), environment["PYTHONPATH"]])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", f"{__package__}.integration_row", name, str(file), f"--samples={samples}"]
        command += [f"--threads={threads}", f"--compile-limit={compile_limit}"]
        ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        content = read_record(file)
    if content is None:
        last = (ended.stderr.strip().splitlines() or ["without a word"])[-1]
        why = f"the process was ended by signal {-ended.returncode}" if ended.returncode < 0 else last
        return IntegrationRow(name, FAILED, why)
    return IntegrationRow.from_json(content)


def cells(row: IntegrationRow) -> list[str]:
    """One row, in the columns of `HEADER`."""
    if row.status != MEASURED:
        return [row.model, ", ".join(row.inputs), f"{row.status}: {row.reason}", *[""] * (len(HEADER) - 3)]
    times = []
    for passes in (FORWARD, TRAINING):
        gains = (*(row.gain(passes, over) for over in (ORIGINAL, COMPILE)), row.gain(passes, COMPILE, BOTH))
        times += [duration(row.seconds[passes][PATCHED]), *("" if g is None else f"{g:.2f} x" for g in gains)]
    memory = (row.memory.get(rival) for rival in (ORIGINAL, COMPILE, PATCHED))
    return [
        row.model,
        ", ".join(row.inputs),
        ", ".join(f"{count} {by}" for by, count in row.replaced.items()) or "nothing",
        str(sum(row.left_alone.values())),
        "" if row.error is None else f"{row.error:.0e}",
        *times,
        ", ".join("unknown" if m is None else size(m) for m in memory),
    ]


def remarks(row: IntegrationRow) -> list[str]:
    """What was left alone and why, what failed, and whether the machine was busy."""
    found = [f"{row.model}, left alone: {count} {what}" for what, count in row.left_alone.items()]
    found += [f"{row.model}, torch.compile of the {rival}: {why}" for rival, why in row.compile_failures.items()]
    if row.other_programs is not None and row.other_programs >= BUSY:
        found.append(f"{row.model}: other programs kept {row.other_programs:.1f} cores busy: do not rely on its times")
    return found


def markdown(results: IntegrationResults) -> str:
    versions = {name: version for row in results.rows for name, version in row.versions.items()}
    lines = ["# Patched models of other libraries", "", *(f"- {line}" for line in where_lines(results.machine))]
    lines += [f"- {results.machine.threads} threads, {results.samples} samples; {results.machine.date}"]
    lines += [f"- {', '.join(f'{name} {version}' for name, version in versions.items())}"] if versions else []
    lines += ["", LEGEND, "", markdown_row(HEADER), markdown_row(["---"] * len(HEADER))]
    lines += [markdown_row(cells(row)) for row in results.rows]
    found = [remark for row in results.rows for remark in remarks(row)]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in found)]).rstrip() + "\n"


def write(path: Path, results: IntegrationResults) -> None:
    write_json(path, results.to_json())
    with complete_file(path.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")


def chosen(names: str | None) -> list[str]:
    """The models of a list of patterns with commas, each once; all without one.

    Raises:
        click.UsageError: there is no such model.
    """
    patterns = ["*"] if names is None else [name.strip() for name in names.split(",")]
    found = {pattern: fnmatch.filter(MODELS, pattern) for pattern in patterns}
    unknown = [pattern for pattern, of_it in found.items() if not of_it]
    if unknown:
        raise click.UsageError(f"--models: no {', '.join(unknown)}; there are {', '.join(MODELS)}")
    return list(dict.fromkeys(name for of_it in found.values() for name in of_it))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--models", metavar="NAME,...", help="Names, or patterns such as 'timm/*'. [default: all]")
@click.option("--samples", type=click.IntRange(1), default=9, show_default=True, help="Of each time.")
@click.option("--threads", type=click.IntRange(1), help="[default: as PyTorch chooses]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="benchmark-results/integrations.json",
    show_default=True,
    help="JSON file; the table goes beside it. With rows of the same machine, threads and samples it is added to.",
)
@click.option(
    "--transformers-4",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="With transformers 4 and what it needs in other versions (pip install --target).",
)
@click.option(
    "--compile-limit",
    type=click.FloatRange(0),
    default=900,
    show_default=True,
    help="Seconds for torch.compile of a model, in each mode; 0 leaves it out.",
)
def main(
    models: str | None, samples: int, threads: int | None, out: Path, transformers_4: Path | None, compile_limit: float
) -> None:
    """Times models of other libraries as they are, compiled, and with the fused operators in place."""
    names = chosen(models)
    torch.set_num_threads(threads or torch.get_num_threads())
    machine = describe()
    try:
        results = IntegrationResults(machine, samples, earlier(out, machine, samples))
        prepare_folder(out.parent)
        _measure(names, results, out, compile_limit, transformers_4)
    except (ValueError, OutputError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(f"interrupted; {out} has what was measured")
        sys.exit(INTERRUPTED)
    click.echo(f"wrote {out} and {out.with_suffix('.md')}")


def _measure(
    names: Sequence[str], results: IntegrationResults, out: Path, compile_limit: float, transformers_4: Path | None
) -> None:
    done = {row.model for row in results.rows if row.status == MEASURED}
    for number, name in enumerate(names, start=1):
        if name in done:
            click.echo(f"[{number} of {len(names)}] {name}: is in {out}")
            continue
        row = measured(name, results.samples, results.machine.threads, compile_limit, transformers_4)
        results.add(row)
        write(out, results)
        click.echo(f"[{number} of {len(names)}] {' | '.join(cell for cell in cells(row) if cell)}")
        for remark in remarks(row):
            click.echo(f"    {remark}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.integrations")
