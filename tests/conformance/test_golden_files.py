"""Files of earlier versions are loaded and answer as they did."""

import json
import pathlib

import catalogue
import golden
import keras
import numpy as np
import pytest
from kit import slow_on_jax

DATA = pathlib.Path(__file__).parent.parent / "data"
VERSIONS = sorted(path.name for path in DATA.iterdir())


@slow_on_jax
@pytest.mark.parametrize("version", VERSIONS)
def test_models_layers_and_the_index(version):
    folder = DATA / version
    expected = np.load(folder / f"{keras.backend.backend()}.npz")
    found = golden.outputs(folder)
    assert found.keys() <= set(expected.files)
    for name, y in found.items():
        # Another processor adds in another order.
        np.testing.assert_allclose(
            y, expected[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("version", VERSIONS)
def test_losses_metrics_kernels_and_schedules(version):
    text = (DATA / version / "objects.json").read_text("utf-8")
    for name, config in json.loads(text).items():
        instance = keras.saving.deserialize_keras_object(config)
        assert type(instance).__name__ == name
        again = keras.saving.serialize_keras_object(instance)
        saved, now = config["config"], again["config"]
        # A later version may know more options, and must keep these.
        assert {k: v for k, v in now.items() if k in saved} == saved


def test_every_class_that_can_be_saved_has_a_file():
    """In the folder of the newest version; `golden.py` writes the next one.

    What was added after that version is in `catalogue.NEW` until then.
    """
    folder = DATA / VERSIONS[-1]
    saved = {path.stem for path in folder.glob("*.keras")}
    saved |= set(json.loads((folder / "objects.json").read_text("utf-8")))
    names = {
        *(name for name, *_ in golden.models()),
        *(name for name, _ in golden.objects()),
    }
    assert names - saved == catalogue.NEW
