"""The table of train steps and machines, of which `test_matrix.py` fills cells.

`docs/scaling.md` shows what is expected, `make verify` prints what was seen.
"""

import train_steps

STEPS = {
    **train_steps.MODELS,
    **{name or "plain": step for name, step in train_steps.METHODS.items()},
}
COLUMNS = (
    "XLA, TensorFlow",
    "XLA, JAX",
    "2 replicas, TensorFlow",
    "2 devices, JAX",
    "bfloat16, TensorFlow",
    "bfloat16, JAX",
    "lowers for TPU",
    "lowers for GPU",
)
# {(step, column): why it does not work}
EXCEPTIONS = {}
# What the tests of this process have seen to work: "step/column".
seen = set()


def saw(step, column):
    seen.add(f"{step}/{column}")


def table(cell):
    """Lines of Markdown; `cell(step, column)` gives the text of a cell."""
    lines = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for step in STEPS:
        name = "plain_training" if step == "plain" else step
        lines.append([f"`{name}`", *(cell(step, c) for c in COLUMNS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def expected():
    """The table of the page."""

    def cell(step, column):
        reason = EXCEPTIONS.get((step, column))
        return f"no: {reason}" if reason else "yes"

    return table(cell)


def summary(seen):
    """The table of what was seen; "·" where no test has passed."""
    return table(lambda *place: "yes" if "/".join(place) in seen else "·")
