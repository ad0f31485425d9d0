"""What a patch did, and its undo."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from torch import nn

from msformer_kernels.patching.classes import Proved, put_back, put_in_place, why_not_undone


@dataclass(frozen=True)
class Replacement:
    """A module whose forward runs through an operator."""

    name: str
    class_name: str
    by: str
    options: str
    error: float
    """The largest relative error of output and gradients, in float64."""
    note: str = ""
    """How much faster it is, "as" with the name of the module that was proved in its place, what does not run through
    the operator."""


@dataclass(frozen=True)
class Refusal:
    """A module that looks like one of those and was left alone."""

    name: str
    class_name: str
    reason: str


@dataclass
class Report:
    """What was replaced, by what, with which error, and what was not, and why. Prints as a table.

    As a context manager it puts the model back at the end of the block.
    """

    replaced: list[Replacement] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    dry_run: bool = False
    """Whether nothing was changed."""
    _modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def put_in_place(self, name: str, module: nn.Module, proved: Proved) -> None:
        """Patches a module, to be undone with the others."""
        put_in_place(module, proved)
        self._modules[name] = module

    def undo(self) -> None:
        """Gives every replaced module its own class back; a second time it does nothing.

        Raises:
            RuntimeError: a module has got another class since, as by `fully_shard`. Then none is changed.
        """
        reasons = [
            f"{name or 'the model'} {why}"
            for name, module in self._modules.items()
            if (why := why_not_undone(module)) is not None
        ]
        if reasons:
            raise RuntimeError("undo: " + "; ".join(reasons))
        for module in self._modules.values():
            put_back(module)
        self._modules.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        would = "would be replaced" if self.dry_run else "replaced"
        rows = [
            (r.name or "(the model)", r.class_name, r.by, r.options, f"{r.error:.0e}", r.note) for r in self.replaced
        ]
        blocks = [f"{would}: {len(self.replaced)}"]
        if rows:
            blocks.append(table(("module", "class", "by", "options", "error", ""), rows))
        blocks.append(f"left alone: {len(self.refused)}")
        for (class_name, reason), names in self._grouped().items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text = f"{class_name}: {', '.join(names[:3])}{more}: {reason}"
            blocks.append(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="    "))
        return "\n".join(blocks)

    def _grouped(self) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = {}
        for r in self.refused:
            found.setdefault((r.class_name, r.reason), []).append(r.name or "(the model)")
        return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join("  " + line.rstrip() for line in lines)
