"""Every Python block of the README runs, and what the README and the profiles' page point to is there.

A block stands alone, unless it is opened as "python continues": it then goes on in the names of the block before it.
"""

import re

import pytest
import torch
from readme_blocks import README, ROOT, blocks

PAGES = [README, ROOT / "profiles" / "README.md"]


def chapters():
    """Lists of blocks, each a block and those that continue it."""
    result = []
    for block in blocks():
        if block.language == "python":
            if "continues" in block.words:
                result[-1].append(block)
            else:
                result.append([block])
    return result


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: f"line{chapter[0].line}")
def test_block_runs(chapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "readme"}
    # A block may turn this on for the whole process; it is off again when the block is done.
    with torch._dynamo.config.patch(trace_autograd_ops=torch._dynamo.config.trace_autograd_ops):
        for block in chapter:
            # Padded, so that a traceback names the line of the README.
            exec(compile("\n" * (block.line - 1) + block.code, str(README), "exec"), names)


def test_words_of_blocks_are_known():
    for block in blocks():
        unknown = [word for word in block.words if word != "continues"]
        assert not unknown, f"README.md line {block.line - 1}: {unknown} means nothing to these tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in re.findall(r"^#+ .*", text, re.M)
    }
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, f"{page.name} has no heading for {link}"
        elif "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} points to {link}, which is not there"
