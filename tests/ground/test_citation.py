"""How to cite: CITATION.cff has what its format requires, and says what is so."""

import yaml

import stas_core
from tests.conftest import ROOT


def test_the_citation_file_has_its_required_fields_and_the_version_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "type", "version", "license"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["version"] == stas_core.__version__
    method = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= method.keys()
    assert all(author.keys() == {"name"} and author["name"] for author in [*cited["authors"], *method["authors"]])
    assert "CITATION.cff" in (ROOT / "README.md").read_text()
