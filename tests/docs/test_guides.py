"""What README, guides and concepts show: every Python block runs, in the order of its page, every command
is one that the command line knows, and links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from foveal.cli import parser

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("guides/*.md"))
CONCEPTS = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("concepts/*.md"))
WRITTEN = ["../README.md", "index.md", *GUIDES, *CONCEPTS]
EVERY = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(foveal .*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", WRITTEN)
def test_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": f"docs.{page}"}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        code = compile("\n" * line + block[1], str(DOCS / page), "exec")
        exec(code, names)


def _commands(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    found = [command for block in FENCED.findall(text) for command in COMMAND.findall(block)]
    return [*found, *re.findall(r"`(foveal [a-z]+ --?[^`\n]*)`", text)]


def test_commands_are_found() -> None:
    assert "foveal list" in " ".join(_commands("../README.md"))
    assert sum(len(_commands(page)) for page in WRITTEN) > 25


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_are_known(page: str) -> None:
    for command in _commands(page):
        try:
            parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"{page}: {command}")


@pytest.mark.parametrize("page", ["../README.md", *EVERY])
def test_links_lead_to_pages(page: str) -> None:
    text = re.sub(
        r"```.*?```|`[^`\n]*`", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    for target in LINK.findall(text):
        if not target.startswith("https://"):
            assert ((DOCS / page).parent / target).exists(), target


def test_the_first_page_names_every_guide() -> None:
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page for page in [*GUIDES, *CONCEPTS] if f"({page})" not in first] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in EVERY:
        if not page.startswith("systems/") or page == "systems/index.md":
            assert f": {page}" in navigation, page
