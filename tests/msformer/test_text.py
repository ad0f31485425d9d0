"""Text of others where it is shown: nothing of it does anything."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pandas as pd
import pytest

from msformer.drawing import drawn
from msformer.evaluation.summary import write_csv
from msformer.messages import plain_warnings, telling
from msformer.output import write_json
from msformer.text import cell_text, markdown_text, visible

NASTY = (
    "tab\t line\n esc\x1b[31m c1\x9b bidi\u202egnp.exe \u2066 null-width\u200b bell\x07 [/b] <script>&amp; | `x` $_$"
)


def test_visible_names_keep_what_people_write() -> None:
    for name in ("病变 1", "آفة", "läsion", "👩‍⚕️", "a b", "[bold]", "می‌خواهم"):
        assert visible(name) == name
    assert visible("a\t\x1b[31m\n\u202e\x9b\U000e0001") == r"a\t\x1b[31m\n\u202e\x9b\U000e0001"
    assert visible(os.fsdecode(b"M\xfcller")) == "M\ufffdller"


def test_json_holds_the_very_name_without_characters_that_are_not_seen(tmp_path: Path) -> None:
    name = NASTY + "\U000e0001"
    write_json(tmp_path / "a.json", {"name": name})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": name}
    assert visible(text.replace("\n", "")) == text.replace("\n", "")


def test_cells_are_on_one_line_and_not_calculated(tmp_path: Path) -> None:
    names = ["=1+1", "@x", NASTY, "plain", None]
    write_csv(pd.DataFrame({"image": names, "dsc": [0.5, -1.0, None, 1, 2]}), tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 6
    found = pd.read_csv(tmp_path / "a.csv")
    assert list(found.image[:4]) == ["'=1+1", "'@x", cell_text(NASTY), "plain"]
    assert list(found.dsc[:2]) == [0.5, -1.0]


def test_markdown_shows_the_text_itself() -> None:
    shown = markdown_text("a_b <i> [x](y) | *z* _w_ & `c`\n")
    assert shown == (r"a_b &lt;i&gt; \[x\](y) \| \*z\* \_w\_ &amp; \`c\`\\n")


def test_warnings_are_safe_lines_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_warnings():
        for _ in range(2):
            warnings.showwarning("x\x1b[31m", UserWarning, "f.py", 3)
        assert capsys.readouterr().err == "warning: x\\x1b[31m\n"
        warnings.showwarning("x\x1b", DeprecationWarning, "f.py", 3)
        assert "f.py:3: DeprecationWarning: x\\x1b" in capsys.readouterr().err
    with telling(quiet=True), plain_warnings():
        warnings.showwarning("y", UserWarning, "f.py", 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["病变 $1_$", "آفة", "emoji 😀 \U0001fae8", "tab\t\x1b", "\ue000 private", "\U0001f1e9"]
)
def test_names_in_any_script_are_drawn_or_replaced(name: str, recwarn: pytest.WarningsRecorder) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 1))
    FigureCanvasAgg(figure)
    what = drawn(name)
    figure.text(0, 0.5, "").set(**what)
    figure.canvas.draw()
    assert not recwarn.list
    assert visible(name)[0] == what["text"][0] or what["text"][0] == "\ufffd"
    assert drawn("läsion 1")["text"] == "läsion 1"
