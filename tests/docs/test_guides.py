"""Every Python block of the guides and concepts runs, in the order of its page; links lead somewhere."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
WRITTEN = sorted(
    path.relative_to(DOCS).as_posix()
    for path in (DOCS / "index.md", *DOCS.glob("guides/*.md"), *DOCS.glob("concepts/*.md"))
)
EVERY = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", WRITTEN)
def test_blocks_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": f"docs.{page}"}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        code = compile("\n" * line + block[1], str(DOCS / page), "exec")
        exec(code, names)


@pytest.mark.parametrize("page", EVERY)
def test_links_lead_to_pages(page: str) -> None:
    text = re.sub(
        r"```.*?```|`[^`\n]*`", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    for target in LINK.findall(text):
        if not target.startswith("https://"):
            assert ((DOCS / page).parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in EVERY:
        if not page.startswith("systems/") or page == "systems/index.md":
            assert f": {page}" in navigation, page
