"""MkDocs hooks: the pages that are generated from the code, and the tables of measured gains.

`python -m mkdocs build` loads this file by its path, so its neighbors are found through `sys.path`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import gains
import reference

_TABLE = re.compile(r"^<!-- gains: (\w+) -->$", re.MULTILINE)
_PAGE_LINK = re.compile(r"(?<=\]\()[^():]+\.md(?=\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add one card per method to the navigation."""
    cards = [{family: [f"methods/{name}.md" for name in names]} for family, names in gains.FAMILIES.items()]
    for entry in config.nav or []:
        if "Methods" in entry:
            entry["Methods"] += cards
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and `llms.txt` with links to the pages of the site."""
    for path, text in reference.generated().items():
        files.append(File.generated(config, path, content=text))
    listed = files.src_uris["llms.txt"]
    files.remove(listed)
    text = _PAGE_LINK.sub(lambda link: files.src_uris[link[0]].dest_uri, listed.content_string)
    files.append(File.generated(config, "llms.txt", content=text))
    return files


def on_page_markdown(markdown: str, **_given: Any) -> str:
    """Replace `<!-- gains: FAMILY -->` with the table of that family."""
    return _TABLE.sub(lambda found: gains.table(found[1]), markdown)
