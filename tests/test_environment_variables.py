"""docs/environment-variables.md names every variable that is read, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "msformer", "csrc", "benchmarks", "studies", "tests", "examples")
FILES = ("setup.py", "noxfile.py")
NAME = r'"(MSFORMER_[A-Z0-9_]+)"'
READ = re.compile(
    rf"(?:environ(?:\.get|\.pop|\.setdefault)?[(\[]|getenv\(|is_set\(|number_from_environment\()\s*{NAME}"
    rf"|{NAME} (?:not )?in os\.environ"
)
TITLE = re.compile(r"^\| `(MSFORMER_[A-Z0-9_]+)` \|", re.MULTILINE)


def read_variables(text: str) -> set[str]:
    return {first or second for first, second in READ.findall(text)}


def test_the_page_names_what_is_read() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths += [ROOT / name for name in FILES]
    sources = [path for path in paths if path.suffix in (".py", ".cpp", ".h", ".cu") and path != Path(__file__)]
    assert len(sources) > 300
    read = set().union(*(read_variables(path.read_text()) for path in sources if path.exists()))
    page = (ROOT / "docs" / "environment-variables.md").read_text()
    assert set(TITLE.findall(page)) == read
    assert set(re.findall(r"MSFORMER_[A-Z0-9_]+", page)) == read


def test_every_way_of_reading_is_known() -> None:
    text = """
        os.environ.get("MSFORMER_A"), os.environ["MSFORMER_B"], os.environ.get(
            "MSFORMER_C", "1"), std::getenv("MSFORMER_D"), is_set("MSFORMER_E"), "MSFORMER_F" not in os.environ
        number_from_environment("MSFORMER_G", 0), os.getenv("MSFORMER_H"), os.environ.setdefault("MSFORMER_I", "1")
        "-DMSFORMER_J", monkeypatch.setenv("MSFORMER_K", "1"), {"MSFORMER_L": "1"}, MSFORMER_M
    """
    assert read_variables(text) == {f"MSFORMER_{letter}" for letter in "ABCDEFGHI"}
