"""What the site has beside the pages of docs/: the results of benchmarks, as pages of their own, and links."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each result, and one that lists them."""
    results = sorted(RESULTS.glob("*.md"))
    titles = {path.name: path.read_text().partition("\n")[0].removeprefix("# ") for path in results}
    for name in titles:
        files.append(File.generated(config, f"benchmarks/{name}", abs_src_path=str(RESULTS / name)))
    listed = "\n".join(f"* [{title}]({name})" for name, title in titles.items())
    files.append(File.generated(config, "benchmarks/index.md", content=f"# Benchmarks\n\n{listed}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between docs/ and benchmarks/, which hold in the repository, into those of the site."""
    return markdown.replace("](../benchmarks/results/", "](benchmarks/").replace("](../../docs/", "](../")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the roles of docstrings into code, and into links where they say the whole name."""
    role = r":(?:func|class|mod|meth|attr):<code>"
    link = r'<autoref identifier="\1" optional><code>\2</code></autoref>'
    html = re.sub(role + r"(?=~?(ssl_geometry[\w.]*))~?(?:[\w.]+\.)?(\w+)</code>", link, html)
    return re.sub(role, "<code>", html)
