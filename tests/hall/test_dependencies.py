"""The dependency rule: who may import whom."""

import ast
import pathlib
import subprocess
import sys

import pytest
from kit import slow_on_jax

PACKAGE = pathlib.Path(__file__).parent.parent.parent / "blogkeras"
# Each part of the hall, with what it may import.
HALL = {"extras": (), "backend": ("extras",), "files": ("arguments",)}
HALL["report"] = ("files", "extras")
HALL["arguments"] = ("backend",)
HALL["typing"] = ()
HALL["ops"] = ("backend", "arguments")
BASE = ("backend", "arguments", "ops")
HALL["state"] = HALL["loops"] = HALL["outputs"] = BASE
HALL["graph"] = HALL["optimizers"] = BASE
HALL["training"] = HALL["models"] = HALL["compression"] = (
    *BASE,
    "state",
    "loops",
    "outputs",
    "graph",
)
HALL["compression"] += ("training", "report", "extras")
FRAMEWORKS = ("tensorflow", "jax")
MAY_IMPORT_FRAMEWORKS = ("backend", "training", "bert4keras")
HEAVY = ("bert4keras", "ot", "matplotlib", "keras_hub", "rich", "tf_keras")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        yield relative.parts[0].removesuffix(".py"), path


def imports(path):
    """Every imported name, with whether it stands at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


def rooms(path):
    """The parts of the package that a file imports."""
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "blogkeras" and len(parts) > 1:
            yield parts[1]


@slow_on_jax
@pytest.mark.parametrize(("room", "path"), list(modules()), ids=str)
def test_dependency_rule(room, path):
    names = [name.split(".")[0] for name, _ in imports(path)]
    if room not in MAY_IMPORT_FRAMEWORKS:
        assert not set(names) & set(FRAMEWORKS)
    if room != "bert4keras":
        assert "bert4keras" not in names
    if room == "__init__":
        return
    allowed = {room, "typing", *HALL.get(room, HALL)}
    if room not in HALL:
        allowed.add("report")
    assert set(rooms(path)) <= allowed


# `report` may be imported at the top of a file: it imports rich and matplotlib
# where it uses them.
def test_importing_the_package_is_light():
    code = (
        "import sys, keras; before = set(sys.modules); import blogkeras; "
        f"print(sorted((set(sys.modules) - before) & set({HEAVY!r})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
