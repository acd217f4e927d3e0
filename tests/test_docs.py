"""Pages of docs: short enough to be read, links that lead somewhere, pictures that are what their script draws."""

import re
from pathlib import Path

import pytest

from docs.images import parallelism_pictures
from models.names import public_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
MOST_WORDS = 600
LONGER = {"settings.md"}
"""The table of all settings, which is generated."""


def test_guide_pages_are_short() -> None:
    words = {page.name: len(page.read_text().split()) for page in (ROOT / "docs").glob("*.md")}
    assert len(words) > 20, "the test looks for nothing"
    assert {name: count for name, count in words.items() if count > MOST_WORDS and name not in LONGER} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_findings_have_their_form_and_are_all_in_the_index() -> None:
    index = (ROOT / "findings" / "README.md").read_text()
    scripts = {path for path in (ROOT / "findings").glob("*.sh") if path.name != "packages.sh"}
    assert {path.name for path in scripts} == set(re.findall(r"\]\(([\w.-]+\.sh)\)", index))
    for path in scripts:
        head, _, body = path.read_text().partition("# shellcheck source=findings/packages.sh\n")
        assert "Guess: " in head and "Behaviour: " in head and re.search(r"\d+\.\d+", head.splitlines()[1]), path
        assert re.search(r"\bexpect ", body), path


def test_the_pictures_of_parallelism_are_what_the_script_draws() -> None:
    for name, picture in parallelism_pictures.PICTURES.items():
        assert (ROOT / f"docs/images/parallel_{name}.svg").read_text() == picture().svg(), name


def test_the_table_of_public_names_is_whole() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs" / "model_names.md").read_text(), re.MULTILINE)
    assert {preset: re.findall(r"`([^`]+)`", names) for preset, names in rows} == public_names()
