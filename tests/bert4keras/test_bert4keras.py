"""The unmodified bert4keras on Keras 3, against bert4keras on tf_keras."""

import importlib.metadata

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
from kit import close_in_ulps

import blogkeras.bert4keras  # noqa: F401
from blogkeras.bert4keras import importing


def assert_same_as_reference(results, reference=None):
    """Compares results of one case with those of tf_keras."""
    name = next(iter(results)).partition("/")[0]
    reference = reference or oracle.reference()
    reference = {k: v for k, v in reference.items() if k.startswith(f"{name}/")}
    assert results.keys() == reference.keys()
    for key, value in results.items():
        tolerance = 1e-4 if "/gradient/" in key else 1e-5
        scale = max(1.0, np.abs(reference[key]).max())
        np.testing.assert_allclose(
            value, reference[key], rtol=0, atol=tolerance * scale, err_msg=key
        )


@pytest.mark.parametrize("name", oracle.QUICK)
def test_model_equals_reference(name):
    results = oracle.run_model(name, checkpoint=name in oracle.CHECKPOINTS)
    assert_same_as_reference(results)


@pytest.mark.verify
@pytest.mark.parametrize("name", oracle.MODELS)
def test_every_model_equals_reference(name):
    results = oracle.run_model(name, checkpoint=True, **oracle.FULL)
    assert_same_as_reference(results, oracle.reference(full=True))


def test_models_are_models_of_keras():
    assert isinstance(oracle.built("bert"), keras.Model)


def test_add_of_mask_and_scores_is_an_error():
    with pytest.raises(ValueError, match="expects tensors of one kind"):
        oracle.build(
            "bert lm", residual_attention_scores=True, num_hidden_layers=2
        )


@pytest.mark.parametrize("name", ["albert", "roformer"])
def test_padding_does_not_matter(name):
    model = oracle.built(name)
    batch = oracle.padded_batch(model, lengths=(4,))
    longer = [np.pad(x, ((0, 0), (0, 5))) for x in batch]
    np.testing.assert_allclose(
        model(longer)[:, :4], model(batch), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["bert nsp mlm", "albert", "nezha", "roformer_v2 unilm"]
)
def test_saves_and_loads_without_custom_objects(name, tmp_path):
    model = oracle.build(name)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    batch = oracle.padded_batch(model)
    outputs = [oracle.as_list(m(batch)) for m in (loaded, model)]
    for reloaded, original in zip(*outputs, strict=True):
        close_in_ulps(reloaded, original)


@pytest.mark.verify
@pytest.mark.parametrize("name", oracle.MODELS)
def test_every_model_saves_and_loads(name, tmp_path):
    test_saves_and_loads_without_custom_objects(name, tmp_path)


def test_trains_under_xla():
    from bert4keras.models import build_transformer_model

    bert = build_transformer_model(
        **oracle.CONFIG, dropout_rate=0.1, attention_dropout_rate=0.1
    )
    logits = keras.layers.Dense(2)(bert.output[:, 0])
    model = keras.Model(bert.inputs, logits)
    model.compile(
        keras.optimizers.SGD(0.2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    x, y = oracle.padded_batch(bert, [9, 6, 3] * 4), np.arange(12) % 2
    losses = model.fit(x, y, epochs=20, batch_size=12, verbose=0).history
    assert losses["loss"][-1] < 0.5 * losses["loss"][0]


def test_attention_dropout_draws_new_numbers():
    model = oracle.build("bert", attention_dropout_rate=0.5)
    batch = oracle.padded_batch(model)
    keras.utils.set_random_seed(1)
    outputs = [np.array(model(batch, training=True)) for _ in range(2)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    np.testing.assert_array_equal(model(batch), model(batch))


def test_dense_layers_of_one_attention_start_out_different():
    from bert4keras.models import build_transformer_model

    model = build_transformer_model(model="bert", **oracle.CONFIG)
    attention = model.get_layer("Transformer-0-MultiHeadSelfAttention")
    q, _, k, *_ = attention.get_weights()
    assert np.abs(q - k).max() > 1e-3


def test_leaves_keras_as_it_is():
    output = oracle.run_python(
        """
        import inspect, os, sys
        import keras, tensorflow as tf
        import keras._tf_keras.keras
        import blogkeras

        assert "bert4keras" not in sys.modules
        distutils = sys.modules.get("distutils")  # TensorFlow 2.18 has it
        modules = {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in ("keras", "distutils")
            or name in ("tensorflow", "tensorflow.keras")
        }

        def snapshot():
            state = {name: sys.modules.get(name) for name in modules}
            for name, module in modules.items():
                for key, value in list(vars(module).items()):
                    state[name, key] = value
                    if inspect.isclass(value):
                        for k, v in list(vars(value).items()):
                            state[value, k] = v
            return state

        def changed(old, new):
            ignored = {"__abstractmethods__", "_abc_impl", "__annotations__"}
            return [
                k for k in {**old, **new}
                if old.get(k) is not new.get(k) and k[-1] not in ignored
            ]

        environment, path = dict(os.environ), list(sys.path)
        names = dict(keras.saving.get_custom_objects())
        tf_keras = dict(vars(tf.keras))
        before = snapshot()
        import blogkeras.bert4keras
        assert not changed(before, snapshot()), changed(before, snapshot())
        assert not changed(tf_keras, dict(vars(tf.keras)))
        assert environment == dict(os.environ) and path == sys.path
        added = keras.saving.get_custom_objects().keys() - names.keys()
        assert all(k.startswith("bert4keras>") for k in added), added
        import keras as again
        assert again is keras
        assert sys.modules.get("distutils") is distutils
        assert "tensorflow.keras.backend" not in sys.modules
        print("same")
        """
    )
    assert output.splitlines()[-1] == "same"


@pytest.mark.parametrize("installed", [None, "0.11.4"])
def test_error_of_another_version(monkeypatch, installed):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ImportError,
        match=r"pip install --no-deps bert4keras==0\.11\.5",
    ):
        importing.check()


def test_error_of_bert4keras_imported_before():
    with pytest.raises(ImportError, match="above the first `import bert4keras"):
        importing.check()


def test_error_of_recomputation(monkeypatch):
    monkeypatch.setenv("RECOMPUTE", "1")
    with pytest.raises(ImportError, match="Unset RECOMPUTE"):
        importing.check()


def test_error_of_another_backend(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="KERAS_BACKEND=tensorflow python"):
        importing.check()
