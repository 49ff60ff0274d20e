"""What the site is more than its pages.

The page "Measured" is benchmarks/README.md, which stays where its scripts are.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SOURCE, PAGE = "../benchmarks/README.md", "measured.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    text = (Path(config.docs_dir) / SOURCE).read_text(encoding="utf-8")
    files.append(File.generated(config, PAGE, content=text.replace("](../docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links to it lead there."""
    return markdown.replace(f"]({SOURCE}", f"]({PAGE}")


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name the theme's search box, and have a keyboard reach tables, which scroll sideways on a phone."""
    named = output.replace('role="dialog"', 'role="dialog" aria-label="Search"')
    return named.replace("<table>", '<table tabindex="0">')
