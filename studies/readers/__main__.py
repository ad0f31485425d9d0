"""The table of readers; see `studies.readers`."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Sequence

import click

from studies.readers import dicom, images, nifti
from studies.readers.compare import Outcome, Source, compare

SOURCES: dict[str, Source] = {"dicom": dicom.SOURCE, "nifti": nifti.SOURCE, "images": images.SOURCE}


def row(source: Source, outcomes: Sequence[Outcome]) -> str:
    """A line of the table."""
    read = [outcome for outcome in outcomes if not outcome.refused]
    empty = sum(outcome.empty for outcome in outcomes)
    cells = [source.name, str(len(outcomes)), str(empty)]
    cells += [f"{len(read)} ({sum(outcome.pictures for outcome in read)})"]
    counts = [
        f"{name} {sum(name in outcome.equal for outcome in read)} of "
        f"{sum(name not in outcome.silent for outcome in read)}"
        for name in source.readers
    ]
    cells += ["; ".join(counts), str(len(outcomes) - len(read) - empty)]
    return f"| {' | '.join(cells)} |"


def details(source: Source, outcomes: Sequence[Outcome], files: bool) -> list[str]:
    """Files that are refused, by reason; files in which readers differ; readers that say nothing, by reason."""
    lines = [f"\n{source.name}\n"]
    reasons = Counter(outcome.refused for outcome in outcomes if outcome.refused and not outcome.empty)
    lines += [f"- refused, {count}: {reason}" for reason, count in reasons.most_common()]
    known = Counter(pair for outcome in outcomes for pair in outcome.explained.items())
    lines += [f"- {name} differs, {count}: {reason}" for (name, reason), count in known.most_common()]
    for outcome in outcomes:
        differing = outcome.differing.items()
        lines += [f"- `{outcome.path.name}` differs from {name}: {problem}" for name, problem in differing]
    silent = Counter(
        (name, reason.partition("/")[0]) for outcome in outcomes for name, reason in outcome.silent.items()
    )
    lines += [f"- {name} says nothing, {count}: {reason}" for (name, reason), count in silent.most_common()]
    if files:
        lines += [
            f"  {outcome.path.name}: {outcome.refused or f'equal {list(outcome.equal)} silent {outcome.silent}'}"
            for outcome in outcomes
        ]
    return lines


@click.command()
@click.option("--files", is_flag=True, help="A line for each file, too.")
@click.option("--only", default=",".join(SOURCES), show_default=True, help="Kinds of files, joined by commas.")
def main(files: bool, only: str) -> None:
    """Compare our reading of files with that of independent readers."""
    warnings.simplefilter("ignore")
    lines, found = [], []
    print("| files of | files | without a picture | read (pictures) | equal to, of those that it reads | refused |")
    print("|---|---|---|---|---|---|")
    for name in only.split(","):
        source = SOURCES[name]
        outcomes = [compare(source, path) for path in source.files()]
        print(row(source, outcomes), flush=True)
        lines += details(source, outcomes, files)
        found += outcomes
    print("\n".join(lines))
    sys.exit(any(outcome.differing for outcome in found))


if __name__ == "__main__":
    main()
