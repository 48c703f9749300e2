"""Every Python snippet of the README runs, each in a namespace of its own.

In this process: importing TensorFlow takes longer than all the snippets.
"""

import pathlib
import re

import keras
import pytest

README = pathlib.Path(__file__).parent.parent.parent / "README.md"
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S
)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


def test_every_post_is_found_in_six_places():
    """By its number: README, code, example, test, page, benchmark."""
    text = README.read_text("utf-8")
    posts = re.findall(r"^\| \[(\d+)\]", text, re.M)
    assert len(posts) >= 10
    root = README.parent
    places = ("blogkeras", "examples", "tests", "docs", "benchmarks")
    for place in places:
        sources = [
            path.read_text("utf-8")
            for ending in ("*.py", "*.md")
            for path in (root / place).rglob(ending)
        ]
        for post in posts:
            assert any(post in source for source in sources), (place, post)


def test_the_page_of_results_repeats_what_was_recorded():
    """Each number with decimals stands in the file that its row links to."""
    page = README.parent / "docs/results.md"
    rows = re.findall(r"^\| (?:\d{4})? *\|.*", page.read_text("utf-8"), re.M)
    assert len(rows) >= 10
    text = ""
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        link = re.search(r"\]\(([^)#]+)", cells[-1])
        if link:
            text = (page.parent / link[1]).read_text("utf-8")
        for number in re.findall(r"\d+\.\d+", cells[2]):
            assert number in text, (row, number)


def test_the_chinese_one_says_the_same():
    """The same code, the same table, the same pages and figures."""
    chinese = README.with_name("README.zh-CN.md").read_text("utf-8")
    english = README.read_text("utf-8")
    for pattern in (r"^```.*?^```", r"^\| \[.*?$", r"\]\((docs/[^)]*)\)"):
        ours, theirs = (
            re.findall(pattern, text, re.M | re.S)
            for text in (english, chinese)
        )
        assert ours == theirs
    sections = [len(re.findall(r"^## ", t, re.M)) for t in (english, chinese)]
    assert sections[0] == sections[1]


# Keras's own `fit` of int64 inputs, under JAX 0.12.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet, tmp_path, monkeypatch):
    if "bert4keras" in snippet and keras.backend.backend() != "tensorflow":
        pytest.skip("bert4keras runs on TensorFlow")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
