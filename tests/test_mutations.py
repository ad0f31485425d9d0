"""The mutations change something, although the sources move on."""

from tests.mutations import MUTATIONS, ROOT


def test_every_mutation_finds_its_place() -> None:
    lost = [m.what for m in MUTATIONS if m.old == m.new or (ROOT / m.file).read_text().count(m.old) == 0]
    assert lost == []
