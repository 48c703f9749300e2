"""Makes the notebooks in docs/notebooks from the examples.

    python docs/_notebooks.py             which are older than their example
    python docs/_notebooks.py --run       makes these again and executes them

One notebook for each `basic_*.py` example: its text, then its parts as cells.
Those that take seconds are executed, each in a process of its own, and keep
what they print and draw; the others show the recorded figures. Needs nothing
but Python, and for `--run` what the example needs.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs/notebooks"
# What the cell that runs an example passes as its options.
OPTIONS = {
    "basic_compare_depths": ["--output", "theseus_depths.png"],
    "basic_electra": ["--output", "electra_bayes.png"],
    "basic_hsic": ["--figure", "hsic_shapes.png"],
    "basic_independence_tests": ["--figure", "independence_tests.png"],
    "basic_partial_transport": ["--output", "."],
    "basic_residual_quantizer": ["--output", "."],
    "basic_robust_pictures": ["--output", "robust_pictures.png"],
    "basic_virtual_adversarial_training": ["--figure", "moons.png"],
    "basic_wrd": ["--figure", "wrd_alignment.png"],
}
# These take minutes: their figures are those of a recorded run.
RECORDED = {
    "basic_denoising_density": ["denoising_density.png"],
    "basic_nvae": ["nvae_samples.png", "nvae_reconstructions.png"],
}


def examples():
    """The examples that become notebooks, by name."""
    paths = sorted((ROOT / "examples").glob("basic_*.py"))
    return {path.stem: path for path in paths}


def cells(path):
    """`(kind, source)` of each cell, kind `"markdown"` or `"code"`.

    The docstring is the first one; the code before the first function, each
    function or class with the constants and comments above it, and the call of
    `main` are the others.
    """
    name, text = path.stem, path.read_text("utf-8")
    lines = text.splitlines()
    body = ast.parse(text).body
    title, _, rest = ast.get_docstring(ast.parse(text)).partition("\n")
    made = f"Made from `examples/{path.name}` by `make notebooks`."
    found = [("markdown", f"# {title}\n\n{linked(rest.strip())}\n\n{made}")]
    ends = [
        node.end_lineno
        for i, node in enumerate(body[1:], 1)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        or (i + 1 < len(body) and is_definition(body[i + 1]))
    ]
    start = body[0].end_lineno
    for end in ends:
        source = "\n".join(lines[start:end]).strip("\n")
        if source:
            found.append(("code", source))
        start = end
    needs_options = "parse_args()" in text
    call = "_ = main()"
    if needs_options:
        options = json.dumps([path.name, *OPTIONS.get(name, [])])
        call = f"import sys\n\nsys.argv = {options}\n{call}"
    found.append(("code", call))
    if name in RECORDED:
        figures = "\n\n".join(f"![{f}](../{f})" for f in RECORDED[name])
        found.append(("markdown", f"It takes minutes. Recorded:\n\n{figures}"))
    return found


def is_definition(node):
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


def linked(text):
    """The post's address as a link, and recorded tables as code."""
    text = re.sub(r"(https://kexue\.fm/archives/(\d+))", r"[\1](\1)", text)
    blocks = re.split(r"\n\n", text)
    return "\n\n".join(
        f"```text\n{block}\n```" if block.startswith("    ") else block
        for block in blocks
    )


def notebook(path, outputs=None):
    """The notebook of an example, format 4.5.

    Args:
        path: The example.
        outputs: For each code cell a list of outputs; `None` for none.
    """
    outputs = iter(outputs or [])
    made = []
    for number, (kind, source) in enumerate(cells(path)):
        cell = {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        if kind == "code":
            found = next(outputs, None)
            count = None if found is None else number
            cell |= {"execution_count": count, "outputs": found or []}
        made.append(cell)
    language = {"display_name": "Python 3", "language": "python"}
    return {
        "cells": made,
        "metadata": {
            "kernelspec": {**language, "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def sources(book):
    return [
        (cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]
    ]


def stale():
    """Names of the examples whose notebook is missing or older."""
    names = []
    for name, path in examples().items():
        file = FOLDER / f"{name}.ipynb"
        old = json.loads(file.read_text("utf-8")) if file.exists() else None
        if old is None or sources(old) != cells(path):
            names.append(name)
    return names


def execute(path):
    """Runs the code cells in one namespace; their outputs."""
    namespace = {"__name__": "__main__"}
    outputs, drawn = [], set(pathlib.Path().rglob("*.png"))
    for kind, source in cells(path):
        if kind != "code":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, path.name, "exec"), namespace)
        found = []
        if out.getvalue():
            text = out.getvalue().splitlines(keepends=True)
            found.append(
                {"name": "stdout", "output_type": "stream", "text": text}
            )
        for figure in sorted(set(pathlib.Path().rglob("*.png")) - drawn):
            drawn.add(figure)
            image = base64.b64encode(figure.read_bytes()).decode()
            found.append(
                {
                    "data": {"image/png": image},
                    "metadata": {},
                    "output_type": "display_data",
                }
            )
        outputs.append(found)
    return outputs


def run(name):
    """Executes one notebook in a process of its own and writes it."""
    path = examples()[name]
    outputs = None
    if name not in RECORDED:
        with tempfile.TemporaryDirectory() as folder:
            here = pathlib.Path(__file__).resolve()
            result = subprocess.run(
                [sys.executable, here, "--execute", name],
                capture_output=True,
                text=True,
                cwd=folder,
            )
        if result.returncode:
            raise SystemExit(f"{name}: {result.stderr[-3000:]}")
        outputs = json.loads(result.stdout.splitlines()[-1])
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(notebook(path, outputs), indent=1, ensure_ascii=False)
    (FOLDER / f"{name}.ipynb").write_text(text + "\n", "utf-8")


def page(name):
    """A notebook as a page of the site: `(markdown, {file: bytes})`."""
    file = FOLDER / f"{name}.ipynb"
    path = examples()[name]
    book = notebook(path)
    if file.exists():
        book = json.loads(file.read_text("utf-8"))
    lines, files = [], {}
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                text = "".join(output["text"]).rstrip("\n")
                lines += ["```text", text, "```", ""]
            else:
                figure = f"{name}_{len(files) + 1}.png"
                image = "".join(output["data"]["image/png"])
                files[figure] = base64.b64decode(image)
                lines += [f"![{name}]({figure})", ""]
    if file.exists():
        lines += [f"[As a notebook]({file.name})", ""]
    return "\n".join(lines), files


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true", help="make them again")
    parser.add_argument("--execute", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.execute:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(execute(examples()[options.execute])))
        return
    names = stale()
    for name in names:
        print(name)
        if options.run:
            run(name)
    if names and not options.run:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
