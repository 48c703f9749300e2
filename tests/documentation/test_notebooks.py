"""Notebooks: of the examples as they are, executed where that takes seconds."""

import json
import pathlib
import runpy

import pytest
from kit import JAX

ROOT = pathlib.Path(__file__).parent.parent.parent
MODULE = runpy.run_path(str(ROOT / "docs/_notebooks.py"))

pytestmark = pytest.mark.skipif(JAX, reason="once is enough")


def test_no_notebook_is_older_than_its_example():
    """`make notebooks` makes them again."""
    assert MODULE["stale"]() == []


@pytest.mark.parametrize("name", sorted(MODULE["examples"]()))
def test_notebook(name):
    book = json.loads((MODULE["FOLDER"] / f"{name}.ipynb").read_text("utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    recorded = MODULE["RECORDED"].get(name)
    assert bool(outputs) != bool(recorded)
    for figure in recorded or ():
        assert (ROOT / "docs" / figure).exists()
    figures = [o for o in outputs if o["output_type"] == "display_data"]
    assert bool(figures) == (name in MODULE["OPTIONS"])
    # Nothing of the machine: paths, warnings.
    assert "/tmp" not in json.dumps(outputs)


def test_cells_are_the_whole_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "basic_x.py"
    path.write_text(
        '"""Title.\n\nText, https://kexue.fm/archives/1\n\n    a table\n"""\n'
        "import sys\n\n# Of a.\nA = 1\n\n\n# About f.\n@staticmethod\n"
        "def f():\n    return A\n\n\nB = 2\n\n\ndef main():\n    print(B)\n\n\n"
        'if __name__ == "__main__":\n    main()\n'
    )
    kinds, sources = zip(*MODULE["cells"](path), strict=True)
    assert kinds == ("markdown", *["code"] * 5)
    assert sources[0].startswith(
        "# Title.\n\nText, [https://kexue.fm/archives/1]"
        "(https://kexue.fm/archives/1)\n\n```text\n    a table\n```"
    )
    assert sources[1:] == (
        "import sys\n\n# Of a.\nA = 1",
        "# About f.\n@staticmethod\ndef f():\n    return A",
        "B = 2",
        "def main():\n    print(B)",
        "_ = main()",
    )
    outputs = MODULE["execute"](path)
    assert outputs == [
        *[[]] * 4,
        [{"name": "stdout", "output_type": "stream", "text": ["2\n"]}],
    ]
