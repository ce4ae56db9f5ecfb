"""Plain English in the README, on the site, in docstrings, help texts and messages."""

import ast
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = sorted(path for room in ("matex_pl", "callbacks", "benchmarks") for path in (ROOT / room).rglob("*.py"))
# Tables that commands write.
GENERATED = "tables"
# Code whose strings are words of reports, patterns or styles.
DATA = {"lexicon.py", "disambiguation.py", "negation.py", "laterality.py"}
LONGEST = 25
# A sentence that stays as it is.
KEPT = "Maps show what a model used, not what a patient has."

BANNED = {
    r"beside|likewise|anew|as far as|so that|of which|in place of|in which|therein|thereof|whereof": "translated idiom",
    r"what (is|was|are|were|has|have|it|they|that|the|a|makes|takes|comes|goes|remains|stays|belongs)(?![^.?!]*\?)": (
        "a noun clause: name the thing"
    ),
    r"who (is|has|wants|reads|writes|uses)(?![^.?!]*\?)": "a noun clause: name the person",
    r"(one|those|ones|these) that": "a pronoun as the subject of a clause: name the thing",
    r"(says|tells|told|hears|knows|forgets|takes part|is said|are said|said of)": "software logs, raises, reads",
    r"\w*(colour|normalis|localis|randomis|optimis|initialis|summaris|behaviour|favour|centre[ds]?\b|grey)\w*": (
        "American spelling"
    ),
    r"films?": "image",
    r"Something is|See what the|Begin anew": "a stock phrase",
}


def found(text):
    """Every banned form in a text."""
    return [
        f"{match.group()!r}: {reason}"
        for pattern, reason in BANNED.items()
        for match in re.finditer(rf"\b({pattern})\b", text.replace(KEPT, ""), re.IGNORECASE)
    ]


def paragraphs(page):
    """Running text of a Markdown page by its first line, without code, links' addresses and tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    depth = 0
    for token in tokens:
        depth += {"table_open": 1, "table_close": -1}.get(token.type, 0)
        if token.type == "inline":
            parts = [
                {"code_inline": "CODE", "softbreak": " "}.get(child.type, child.content if child.type == "text" else "")
                for child in token.children
            ]
            yield token.map[0] + 1, "".join(parts), depth > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page):
    if GENERATED in page.parts:
        return
    problems = []
    for line, text, in_table in paragraphs(page):
        problems += [f"{page.name}:{line}: {form}" for form in found(text)]
        if in_table:
            continue
        for sentence in re.split(r"(?<=[.?!:;])\s+(?=[A-Z(“\"*]|CODE)", text):
            count = len(re.findall(r"[^\W\d_][\w'\u2019-]*", sentence))
            if count > LONGEST:
                problems.append(f"{page.name}:{line}: {count} words in a sentence: {sentence[:60]}...")
        if text.count(";") > 1:
            problems.append(f"{page.name}:{line}: {text.count(';')} semicolons in a paragraph")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_messages(path):
    if path.name in DATA:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            problems += [f"{path.name}:{node.lineno}: {form}" for form in found(node.value)]
            problems += [
                f"{path.name}:{node.lineno}: an argument begins with 'Of'"
                for _ in re.finditer(r"^ +\w+: Of\b", node.value, re.MULTILINE)
            ]
    assert not problems, "\n".join(problems)
