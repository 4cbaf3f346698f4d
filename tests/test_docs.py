from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from server.cli import app
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


def test_the_tree_of_the_readme_is_as_the_modules_say() -> None:
    spec = importlib.util.spec_from_file_location("docs_tree", ROOT / "docs" / "tree.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.written(readme) == readme, "run python docs/tree.py"


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    for field in Settings.model_fields:
        assert f"`LIGHTBOX_{field.upper()}`" in text


def test_every_command_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        assert command.callback is not None
        assert re.search(rf"`?lightbox {command.callback.__name__}\b", readme), command.callback.__name__


@pytest.mark.parametrize("page", sorted(path.name for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
