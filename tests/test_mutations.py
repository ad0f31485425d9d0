"""The mutations find their places, although the sources move on."""

from tests.mutations import MUTATIONS, ROOT


def test_every_mutation_finds_its_place() -> None:
    lost = [m.what for m in MUTATIONS if m.old not in (ROOT / m.file).read_text()]
    assert lost == []
