"""Names of Keras 2.3.1 and TensorFlow 1, and how old scripts are run."""

import importlib
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import tensorflow as tf

import blogkeras.bert4keras  # noqa: F401
from blogkeras.bert4keras import backend, importing, old_names

LIST = pathlib.Path(__file__).parent / "keras_2_3_1.txt"


def read_names():
    """Returns the public names of Keras 2.3.1 by the name of the module."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(": ") for line in lines if not line.startswith("#")]
    return {module: names.split() for module, names in pairs}


@pytest.fixture
def stood_in():
    """Lets `keras` mean what it means to an old script, during a test."""

    def is_replaced(name):
        return name.partition(".")[0] in ("keras", "tensorflow")

    before = {k: v for k, v in sys.modules.items() if is_replaced(k)}
    sys.modules.pop("blogkeras.bert4keras.keras2", None)
    importlib.import_module("blogkeras.bert4keras.keras2")
    yield
    for name in [name for name in sys.modules if is_replaced(name)]:
        if name not in before:
            del sys.modules[name]
    sys.modules.update(before)


def test_every_name_is_there_or_refused_with_a_reason(stood_in):
    refused = dict(old_names.REFUSED, backend=backend.REFUSED)
    for module, names in read_names().items():
        imported = importlib.import_module(f"keras.{module}")
        for name in names:
            reason = refused.get(module, {}).get(name)
            if reason is None:
                assert getattr(imported, name) is not None
                continue
            with pytest.raises(AttributeError, match="no counterpart") as error:
                getattr(imported, name)
            assert reason in str(error.value)


def test_what_is_refused_is_a_name_of_keras_2():
    known = read_names()
    for module, names in dict(
        old_names.REFUSED, backend=backend.REFUSED
    ).items():
        assert names.keys() <= set(known[module]), module


def test_modules_of_keras_2_are_found(stood_in):
    from keras.backend.tensorflow_backend import set_session
    from keras.callbacks.callbacks import ModelCheckpoint
    from keras.engine.topology import Layer
    from keras.layers.core import Dense
    from keras.layers.recurrent import LSTM
    from keras.legacy import interfaces
    from keras.objectives import mse
    from keras.preprocessing.sequence import pad_sequences
    from keras.preprocessing.text import Tokenizer
    from keras.utils.generic_utils import has_arg, to_list
    from keras.utils.np_utils import to_categorical

    root = importlib.import_module("keras")
    assert Layer is root.layers.Layer
    assert Dense is root.layers.Dense
    assert root.layers.CuDNNLSTM is LSTM
    assert type(LSTM(3)) is keras.layers.LSTM
    assert ModelCheckpoint is root.callbacks.ModelCheckpoint
    assert mse(np.zeros(2), np.ones(2)) == 1
    assert pad_sequences([[1]], 2).tolist() == [[0, 1]]
    tokenizer = Tokenizer()
    tokenizer.fit_on_texts(["a b a"])
    assert tokenizer.word_index == {"a": 1, "b": 2}
    assert to_categorical([1], 2).tolist() == [[0, 1]]
    assert has_arg(lambda a: a, "a")
    assert not has_arg(lambda a: a, "b")
    assert has_arg(lambda **k: k, "b", accept_all=True)
    assert to_list(1) == [1]
    assert root.utils.unpack_singleton([3]) == 3
    assert root.utils.is_all_none([None])
    assert to_list((1,), True) == [1]
    assert root.utils.count_params([np.zeros((2, 3)), np.zeros(4)]) == 10
    assert interfaces.legacy_get_updates_support(len) is len
    with pytest.raises(AttributeError):
        _ = interfaces.other
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = root.layers.other
    set_session(tf.compat.v1.Session())


def test_old_functions_of_losses_and_metrics(stood_in):
    root = importlib.import_module("keras")
    a, b = np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]])
    cosine = 24 / 25
    np.testing.assert_allclose(root.losses.cosine(a, b), [-cosine], rtol=1e-6)
    np.testing.assert_allclose(root.metrics.cosine(a, b), [cosine], rtol=1e-6)
    np.testing.assert_array_equal(root.metrics.accuracy(a, a), [[1, 1]])
    np.testing.assert_allclose(root.losses.huber_loss(a, b), [0.5])
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = np.sum(p * np.log(p / q), -1)
    for name in ("kld", "KLD", "kullback_leibler_divergence"):
        np.testing.assert_allclose(
            getattr(root.losses, name)(p, q), expected, rtol=1e-5
        )
    for name in ("mse", "MSE", "mean_squared_error"):
        np.testing.assert_allclose(getattr(root.losses, name)(a, b), [1.0])
    assert root.initializers.normal().stddev == 0.05


def test_tensorflow_keras_is_the_same_keras(stood_in):
    import tensorflow as tensorflow_of_scripts
    from tensorflow.keras.layers import Lambda
    from tensorflow.python.keras import backend as K

    root = importlib.import_module("keras")
    assert tensorflow_of_scripts.keras is root
    assert Lambda is root.layers.Lambda
    assert K is root.backend
    assert tensorflow_of_scripts.float32 is tf.float32
    # TensorFlow 1's names are those of tf.compat.v1; TensorFlow has them not.
    assert tensorflow_of_scripts.log is tf.compat.v1.log
    assert tensorflow_of_scripts.ConfigProto is tf.compat.v1.ConfigProto
    assert not hasattr(tf, "ConfigProto")
    with pytest.raises(AttributeError):
        _ = tensorflow_of_scripts.no_such_name


def test_error_of_several_gpus_that_are_not_there(stood_in):
    root = importlib.import_module("keras")
    with pytest.raises(ValueError, match="gpus=2"):
        root.utils.multi_gpu_model(None, gpus=2)


def test_warns_of_another_copy_of_bert4keras(tmp_path, monkeypatch):
    (tmp_path / "bert4keras").mkdir()
    (tmp_path / "bert4keras/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bert4keras")
    importlib.invalidate_caches()
    with (
        pytest.warns(UserWarning, match="not the copy"),
        importing._installed_first(),
    ):
        spec = importlib.util.find_spec("bert4keras")
    assert pathlib.Path(spec.origin).parent.parent != tmp_path
    assert sys.path[0] == str(tmp_path)


SCRIPT = """
import os
os.environ["TF_KERAS"] = "1"
import sys
import numpy as np
import tensorflow as tf
import tensorflow.keras.backend as K
from tensorflow.keras.layers import Dense, Lambda
from bert4keras.backend import keras, is_tf_keras, K as K_of_bert4keras
from bert4keras.models import build_transformer_model
from keras.models import Model, load_model

assert is_tf_keras and K is K_of_bert4keras and tf.keras is keras
assert sys.argv[1:] == ["argument"], sys.argv
config = tf.ConfigProto()
config.gpu_options.allow_growth = True
K.set_session(tf.Session(config=config))
bert = build_transformer_model(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, hidden_act="gelu", max_position=8,
)
model = Model(bert.input, Dense(2)(Lambda(lambda x: x[:, 0])(bert.output)))
model.compile("sgd", "mse")
model.save_weights("best_model.h5")
model.load_weights("best_model.h5")

def batches():
    while True:
        yield [np.array([[1, 2]]), np.zeros((1, 2))], np.zeros((1, 2))

model.fit_generator(batches(), steps_per_epoch=1, verbose=0)
model.save("model")
print(load_model("model").predict([[[1, 2]], [[0, 0]]]).shape, K.floatx())
"""


def test_runs_an_old_script_without_any_change(tmp_path):
    """Beside it lies a copy of some bert4keras, which is not imported."""
    (tmp_path / "bert4keras").mkdir()
    (tmp_path / "bert4keras/__init__.py").write_text("raise SystemExit(3)")
    (tmp_path / "old_script.py").write_text(SCRIPT)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "blogkeras.bert4keras",
            "old_script.py",
            "argument",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "TF_KERAS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "(1, 2) float32"
    assert "not the copy" in result.stderr
