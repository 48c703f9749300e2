"""What Keras 3 offers, with models of bert4keras."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle
import toy
from kit import close_in_ulps

import blogkeras
import blogkeras.bert4keras

# isort: split
from bert4keras import backend, layers, optimizers


@pytest.fixture
def policy(request):
    """Sets the dtype policy `request.param` during a test."""
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


HALF = pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16"], indirect=True
)
TOLERANCE = {"mixed_float16": 0.004, "mixed_bfloat16": 0.04}


def assert_close_to_float32(name, policy):
    keras.config.set_dtype_policy("float32")
    model = oracle.build(name)
    expected = oracle.as_list(model(oracle.padded_batch(model)))
    keras.config.set_dtype_policy(policy)
    results = oracle.run_model(name)
    for i, y in enumerate(map(np.array, expected)):
        value = results[f"{name}/output/{i}"].astype("float32")
        atol = TOLERANCE[policy] * np.abs(y).max()
        np.testing.assert_allclose(value, y, rtol=0, atol=atol)
    for value in results.values():
        assert np.isfinite(value.astype("float32")).all()


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("bert nsp mlm", "mixed_float16"),
        ("roformer_v2 unilm", "mixed_bfloat16"),
    ],
    indirect=["policy"],
)
def test_half_precision_is_close_to_float32(name, policy):
    assert_close_to_float32(name, policy)


@pytest.mark.verify
@HALF
@pytest.mark.parametrize("name", oracle.MODELS)
def test_half_precision_of_every_model(name, policy):
    assert_close_to_float32(name, policy)


@pytest.mark.verify
@HALF
def test_half_precision_of_every_layer(policy):
    for name, function in oracle.layer_cases().items():
        assert oracle.run_layer(name, function)


@HALF
def test_positions_are_not_rounded(policy):
    ids = np.array([[0, 257, 999, 1001]], "float32")
    x = keras.Input((4, 8))
    p = keras.Input((4,))
    layer = layers.PositionEmbedding(
        1024,
        8,
        "zero",
        custom_position_ids=True,
        embeddings_initializer="normal",
    )
    model = keras.Model([x, p], layer([x, p]))
    expected = layer.get_weights()[0][ids.astype(int)]
    found = model([np.zeros((1, 4, 8)), ids])
    np.testing.assert_allclose(
        np.array(found, "float32"), expected, rtol=0.01, atol=1e-3
    )


VERIFY = [pytest.mark.verify]


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("mixed_float16", {"run_eagerly": True}),
        pytest.param("mixed_float16", {"jit_compile": True}, marks=VERIFY),
        pytest.param("mixed_bfloat16", {"run_eagerly": True}, marks=VERIFY),
        pytest.param("mixed_bfloat16", {"jit_compile": True}, marks=VERIFY),
    ],
    indirect=["policy"],
)
def test_trains_in_half_precision(policy, options):
    bert = oracle.build(
        "albert",
        dropout_rate=0.1,
        attention_dropout_rate=0.1,
        num_hidden_layers=1,
    )
    logits = keras.layers.Dense(2, dtype="float32")(bert.output[:, 0])
    model = keras.Model(bert.inputs, logits)
    adam = optimizers.extend_with_piecewise_linear_lr(optimizers.Adam)
    model.compile(
        adam(1e-3, lr_schedule={4: 1.0}),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **options,
    )
    x, y = oracle.padded_batch(bert, [9, 6, 3, 2]), np.arange(4) % 2
    history = model.fit(x, y, epochs=4, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert {w.dtype for w in model.weights} == {"float32"}


@pytest.mark.verify
def test_lengths_in_buckets_compile_once_each():
    bert = oracle.build("bert")
    model = keras.Model(
        bert.inputs, keras.layers.Dense(2, "softmax")(bert.output[:, 0])
    )
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    shapes = set()

    def step(length):
        padded = 8 * -(-length // 8)
        x = oracle.padded_batch(bert, [length, 2])
        x = [np.pad(a, ((0, 0), (0, padded - length))) for a in x]
        shapes.add(x[0].shape)
        return model.train_on_batch(x, np.array([0, 1]))

    losses = [step(length) for length in (5, 8, 7, 12, 16, 3)]
    assert np.isfinite(losses).all()
    assert shapes == {(2, 8), (2, 16)}


@pytest.mark.parametrize("Model", [keras.Model, backend.keras.models.Model])
def test_functional_surgery(Model, tmp_path):
    bert = oracle.built("bert pool")
    inner = bert.get_layer("Transformer-0-FeedForward-Norm").output
    outputs = keras.layers.Dense(3, name="Head")(inner)
    model = Model(bert.inputs, outputs)
    assert isinstance(model, keras.Model)
    batch = oracle.padded_batch(bert)
    assert model(batch).shape == (3, 9, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    close_in_ulps(loaded(batch), model(batch))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    close_in_ulps(clone(batch), model(batch))


def test_nested_model_and_frozen_layers():
    bert = oracle.build("gpt2_ml")
    for layer in bert.layers:
        layer.trainable = False
    tokens = keras.Input((None,), name="Tokens")
    model = keras.Model(tokens, keras.layers.Dense(2)(bert(tokens)))
    assert len(model.trainable_weights) == 2
    batch = oracle.padded_batch(bert)[0]
    model.compile("sgd", "mse", run_eagerly=True)
    before = bert.get_weights()
    model.train_on_batch(batch, np.zeros((3, 9, 2)))
    for new, old in zip(bert.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_summary_names_the_layers():
    lines = []
    oracle.built("bert").summary(print_fn=lines.append, line_length=120)
    text = "".join(lines)
    assert "MultiHeadAttention" in text
    assert "Total params" in text


def test_one_model_of_each_keras_in_one_graph():
    bert = oracle.built("bert")
    x = keras.layers.LayerNormalization()(bert.output)
    x = keras.layers.MultiHeadAttention(2, 8)(x, x)
    x = layers.GlobalPointer(2, 8)(x)
    model = keras.Model(bert.inputs, x)
    assert model(oracle.padded_batch(bert)).shape == (3, 2, 9, 9)


def test_adversarial_training_of_a_bridged_model():
    bert = oracle.build("bert")
    outputs = keras.layers.Dense(2, "softmax", name="Head")(bert.output[:, 0])
    model = keras.Model(bert.inputs, outputs)
    model.compile(
        keras.optimizers.SGD(0.1),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    x, y = oracle.padded_batch(bert), np.array([0, 1, 0])
    start = model.get_weights()
    model.train_on_batch(x, y)
    plain = model.get_weights()
    model.set_weights(start)
    blogkeras.adversarial_training(model, "Embedding-Token", 0.5)
    model.train_on_batch(x, y)
    difference = [
        np.abs(a - b).max()
        for a, b in zip(plain, model.get_weights(), strict=True)
    ]
    assert np.isfinite(difference).all()
    assert max(difference) > 1e-4


@pytest.mark.verify
def test_keras_hub_backbone_and_bridged_model_in_one_graph():
    backbone = toy.keras_hub_bert(
        vocabulary_size=60, hidden_dim=32, intermediate_dim=48, dropout=0.1
    )
    hub = backbone.output["sequence_output"]
    x = layers.LayerNormalization()(hub)
    x = layers.ConditionalRandomField()(keras.layers.Dense(4)(x))
    model = keras.Model(backbone.input, x)
    ids = np.ones((2, 5), int)
    inputs = {"token_ids": ids, "segment_ids": 0 * ids, "padding_mask": ids}
    assert model(inputs).shape == (2, 5, 4)


@pytest.mark.verify
def test_two_replicas_train_as_one():
    output = oracle.run_python(
        """
        import numpy as np, tensorflow as tf
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            device, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        import blogkeras.bert4keras, keras
        import bert4keras_oracle as oracle
        from bert4keras import optimizers

        AdamEMA = optimizers.extend_with_exponential_moving_average(
            optimizers.extend_with_weight_decay(optimizers.Adam)
        )

        def train(strategy):
            with strategy.scope():
                bert = oracle.build("bert")
                out = keras.layers.Dense(1, name="Head")(bert.output[:, 0])
                model = keras.Model(bert.inputs, out)
                oracle.randomize(model)
                # A large epsilon, that rounding errors do not flip signs.
                optimizer = AdamEMA(0.01, epsilon=1e-2)
                model.compile(optimizer, "mse", jit_compile=False)
            x = oracle.padded_batch(bert, [9, 6, 3, 5])
            y = np.arange(4.0)[:, None]
            model.fit(x, y, batch_size=4, epochs=4, shuffle=False, verbose=0)
            model.optimizer.apply_ema_weights()
            return model.get_weights()

        one = train(tf.distribute.get_strategy())
        two = train(tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"]))
        print(max(abs(a - b).max() for a, b in zip(one, two)))
        """
    )
    assert float(output.splitlines()[-1]) < 1e-5


@HALF
def test_layers_inside_of_a_layer_see_the_mask(policy):
    """A layer of one's own is computed in float32: the cast keeps the mask."""

    class Mean(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.supports_masking = True
            self.mean = keras.layers.GlobalAveragePooling1D()

        def call(self, inputs):
            return self.mean(inputs)

        def compute_output_shape(self, shape):
            return shape[0], shape[2]

        def compute_mask(self, inputs, mask=None):
            return None

    table = keras.initializers.Constant([[8.0], [1.0], [2.0], [3.0]])
    tokens = keras.Input((4,), dtype="int32")
    embedding = keras.layers.Embedding(
        4, 1, mask_zero=True, embeddings_initializer=table
    )
    model = keras.Model(tokens, Mean()(embedding(tokens)))
    assert np.array(model(np.array([[1, 3, 0, 0]]))).tolist() == [[2.0]]
