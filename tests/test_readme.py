"""Every Python snippet of the README runs, each in a process of its own."""

import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S
)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet, tmp_path):
    if "bert4keras" in snippet and keras.backend.backend() != "tensorflow":
        pytest.skip("bert4keras runs on TensorFlow")
    result = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
