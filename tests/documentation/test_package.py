"""What setup.py says of the package."""

import pathlib
import re
import runpy

import pytest
import setuptools
from kit import JAX

import blogkeras

ROOT = pathlib.Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(JAX, reason="once is enough")


@pytest.fixture
def package(monkeypatch):
    """What setup.py hands to setuptools, and its names."""
    handed = {}
    monkeypatch.setattr(setuptools, "setup", handed.update)
    names = runpy.run_path(str(ROOT / "setup.py"))
    return handed, names


def test_the_version_is_one(package):
    handed, _ = package
    assert handed["version"] == blogkeras.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version, date = re.search(
        r"^## (\d\S*) \((.*)\)$", changelog, re.M
    ).groups()
    assert version == blogkeras.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


def test_links_of_the_description_work_outside(package):
    handed, names = package
    text = handed["long_description"]
    outside = r"\]\((?![a-z]+:|#)"
    if not names["REPOSITORY"]:
        assert not re.search(outside, _prose(text))
    readme = "![f](docs/f.png) [a](docs/a.md#b) [c](https://c) [d](#d)\n"
    code = "```python\nx[0](y)\n```\n"
    describe = names["description"]
    v = blogkeras.__version__
    assert describe(readme + code, "https://r") == (
        f"![f](https://r/raw/v{v}/docs/f.png) "
        f"[a](https://r/blob/v{v}/docs/a.md#b) [c](https://c) [d](#d)\n" + code
    )
    assert describe(readme + code, "") == " a [c](https://c) [d](#d)\n" + code


def _prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_extras_are_what_is_imported(package):
    """Each command that an error or a page names installs something."""
    handed, _ = package
    extras = handed["extras_require"]
    for smaller, larger in (
        ("jax", "test"),
        ("examples", "test"),
        ("test", "bench"),
    ):
        assert set(extras[smaller]) < set(extras[larger])
    # An environment without TensorFlow, which the extra would bring along.
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for requirement in extras["docs"]:
        assert f"'{requirement}'" in makefile
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    pages += [*(ROOT / "blogkeras").rglob("*.py"), *ROOT.glob("examples/*.py")]
    named = set()
    for path in pages:
        text = path.read_text("utf-8")
        for names in re.findall(r"(?:blogkeras|\.)\[([a-z0-9,]+)\]'", text):
            named |= set(names.split(","))
    assert {"examples", "jax"} <= named <= set(extras)


def test_the_sources_are_complete():
    """MANIFEST.in takes along each tracked kind of file."""
    manifest = (ROOT / "MANIFEST.in").read_text("utf-8").split()
    ignored = {".git", "blogkeras.egg-info", "results", "build", "dist"}
    ignored |= {"PKG-INFO", "setup.cfg"}  # of an unpacked sdist
    for path in ROOT.iterdir():
        hidden = path.name.startswith((".venv", ".pytest", ".ruff", ".mypy"))
        if hidden or path.name in ignored | {"blogkeras", "setup.py"}:
            continue
        if path.name not in ("__pycache__", "MANIFEST.in", "shared"):
            assert path.name in manifest
