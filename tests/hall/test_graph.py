"""Blocks and cuts: what the segments compute is what the model computes."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kit import close_in_ulps, value

from blogkeras.graph import (
    copied,
    cut_model,
    find_blocks,
    keep_blocks,
    rearranged,
    spaced_blocks,
)

X = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")


@keras.saving.register_keras_serializable("test_graph")
class Mixer(layers.Layer):
    """y = x W + bias, whose parameters come before the input by alphabet."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)

    def build(self, inputs_shape, attention_bias_shape):
        self.dense.build(inputs_shape)

    def call(self, inputs, attention_bias=None):
        return self.dense(inputs) + attention_bias

    def compute_output_shape(self, *args, **kwargs):
        return (None, 4)


@keras.saving.register_keras_serializable("test_graph")
class TransformerBlock(layers.Layer):
    """x + tanh(x W)."""

    def __init__(self, rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.dense = layers.Dense(4, "tanh")
        self.dropout = layers.Dropout(rate)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return x + self.dropout(self.dense(x))

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable("test_graph")
class Two(layers.Layer):
    """Returns the dict of two tensors, of which the second goes on."""

    def call(self, x):
        return {"a": 0 * x, "b": x + 1}


def base(blocks=3, name="base", **kwargs):
    x = inputs = keras.Input((4,))
    x = layers.Dense(4, name="embedding")(x)
    for i in range(blocks):
        x = TransformerBlock(name=f"body_{i}", **kwargs)(x)
    return keras.Model(inputs, layers.Dense(4, name="pool")(x), name=name)


def nested(how, body=None):
    body = body or base()
    head = [layers.Dense(3, name="hidden"), layers.Dense(2, name="classes")]
    if how == "sequential":
        return keras.Sequential([body, *head])
    if how == "sequences":
        return keras.Sequential(
            [keras.Input((4,)), keras.Sequential([body, head[0]]), head[1]]
        )
    inputs = keras.Input((4,), name="x")
    inside = {"x": inputs}
    middle = keras.Model(inside, {"y": body(2 * inputs)}, name="middle")
    outer = {"x": keras.Input((4,), name="x")}
    x = middle(outer)["y"] + outer["x"]
    return keras.Model(outer, head[1](head[0](x)))


def data(model):
    return X if isinstance(model, keras.Sequential) else {"x": X}


def chain(segments, x):
    x = keras.tree.map_structure(ops.convert_to_tensor, x)
    for segment in segments:
        x = segment(x)
    return value(x)


def names(blocks):
    parts = [getattr(block, "parts", None) or block.layers for block in blocks]
    return [[layer.name for layer in layers] for layers in parts]


def test_called_by_keyword():
    """The block's input is its first parameter, not the first by alphabet."""
    inputs = keras.Input((4,))
    bias = layers.Dense(4, name="bias")(inputs)
    x = embedded = layers.Dense(4, name="embedding")(inputs)
    for i in range(2):
        x = Mixer(name=f"encoder_block_{i}")(attention_bias=bias, inputs=x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    _, blocks = find_blocks(model)
    assert blocks[0].input is embedded
    assert blocks[1].input is blocks[0].output
    stem, *modules, head = cut_model(model)
    assert [p.name for p in stem.parts] == ["embedding"]
    # The bias is a side input, computed in the first block.
    assert [p.name for p in modules[0].parts] == ["bias", "encoder_block_0"]
    close_in_ulps(chain([stem, *modules, head], X), value(model(X)))


@keras.saving.register_keras_serializable("test_graph")
class DictMixer(Mixer):
    """The same, called with a dict."""

    def build(self, input_shape):
        self.dense.build((None, 4))

    def call(self, inputs):
        return self.dense(inputs["x"]) + inputs["bias"]


@pytest.mark.parametrize("blocks", [2, 3])
def test_called_with_a_dict(blocks):
    """What comes from the block before is what the block transforms."""
    inputs = keras.Input((4,))
    bias = layers.Dense(4, name="bias")(inputs)
    x = embedded = layers.Dense(4, name="embedding")(inputs)
    for i in range(blocks):
        x = DictMixer(name=f"encoder_block_{i}")({"x": x, "bias": bias})
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    _, found = find_blocks(model)
    assert found[0].input is embedded
    assert found[1].input is found[0].output
    close_in_ulps(chain(cut_model(model), X), value(model(X)))


@pytest.mark.parametrize(
    "name",
    [
        "transformer_layer_7",
        "decoder_block_7",
        "f_net_layer_7",
        "transformer_encoder_layer_7",
        "encoder_layer_7",
        "encoder_block_7",
        "disentangled_attention_encoder_layer_7",
        "group_0_inner_layer_7",
        "xlnet_encoder_7",
        "my_transformer_block_7",
        "transformer_block",
        "prefix-Transformer-7-FeedForward",
    ],
)
def test_blocks_found_by_name(name):
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="encoder_block_attn_mask_layer")(inputs)
    x = layers.Dense(4, name=name)(x)
    model = keras.Model(inputs, layers.Dense(2, name="transformer_head")(x))
    assert names(find_blocks(model)[1]) == [[name]]


def test_blocks_found_by_class_and_list():
    model = base()
    expected = [["body_0"], ["body_1"], ["body_2"]]
    assert names(find_blocks(model)[1]) == expected
    # What a model lists counts before names and classes.
    model.transformer_layers = [model.get_layer("pool")]
    assert names(find_blocks(model)[1]) == [["pool"]]
    assert names(find_blocks(nested("sequential", model))[1]) == [["pool"]]


def test_shared_layers_are_as_many_blocks():
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="embedding")(inputs)
    shared = [layers.Dense(4, name=f"Transformer-{n}") for n in ("A", "B")]
    for _ in range(3):
        x = shared[1](shared[0](x))
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    _, blocks = find_blocks(model)
    assert names(blocks) == [["Transformer-A", "Transformer-B"]] * 3
    numbers = [[call.number for call in block.calls] for block in blocks]
    assert numbers == [[0, 0], [1, 1], [2, 2]]
    close_in_ulps(chain(cut_model(model), X), value(model(X)))


def test_the_output_that_goes_on():
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="embedding")(inputs)
    for i in range(2):
        x = Two(name=f"encoder_layer_{i}")(x)["b"]
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    _, blocks = find_blocks(model)
    assert blocks[0].output is blocks[1].input
    assert blocks[1].output is blocks[1].calls[0].outputs[1]


HOW = ["sequential", "sequences", "dicts"]


@pytest.mark.parametrize("how", HOW)
def test_nested_models_are_opened(how):
    model = nested(how)
    expected = value(model(data(model)))
    segments = cut_model(model)
    assert [s.parts[-1].name for s in segments[:4]] == [
        "embedding",
        "body_0",
        "body_1",
        "body_2",
    ]
    found = {p.name for s in segments for p in s.parts}
    assert found >= {"pool", "hidden", "classes"}
    close_in_ulps(chain(segments, data(model)), expected)
    assert {id(w) for s in segments for w in s.weights} == {
        id(w) for w in model.weights
    }
    # And again, with what has been revived.
    config = keras.saving.serialize_keras_object(segments[1])
    revived = keras.saving.deserialize_keras_object(config)
    assert [p.name for p in revived.parts] == [
        p.name for p in segments[1].parts
    ]


@pytest.mark.parametrize("how", HOW)
def test_boundaries_in_nested_models(how):
    body = base()
    model = nested(how, body)
    expected = value(model(data(model)))
    places = ["embedding", body.get_layer("body_1"), body.output, "hidden"]
    segments = cut_model(model, places)
    ends = [segment.parts[-1].name for segment in segments]
    assert ends == ["embedding", "body_1", "pool", "hidden", "classes"]
    close_in_ulps(chain(segments, data(model)), expected)
    with pytest.raises(ValueError, match="or in a model among these"):
        cut_model(model, ["nowhere"])


def test_what_need_not_be_opened_stays_closed():
    model = nested("sequential")
    [*_, head] = segments = cut_model(model, ["base", "hidden"])
    assert [[p.name for p in s.parts] for s in segments] == [
        ["base"],
        ["hidden"],
        ["classes"],
    ]
    assert head.index == 2


def test_a_nested_model_that_is_called_twice():
    body = base(1)
    a, b = keras.Input((4,)), keras.Input((4,))
    both = layers.Subtract(name="subtract")([body(a), body(b)])
    model = keras.Model([a, b], layers.Dense(2)(both))
    x = [X, X[::-1]]
    segments = cut_model(model, ["subtract"])
    close_in_ulps(chain(segments, x), value(model(x)))
    # Two towers are no chain.
    with pytest.raises(ValueError, match="to depend on the one before"):
        cut_model(model)


def test_names_that_clash():
    model = keras.Sequential([base(), layers.Dense(2, name="pool")])
    model.build((None, 4))
    with pytest.raises(ValueError, match='name "pool" is used 2 times'):
        cut_model(model)


@pytest.mark.parametrize("training", [False, True])
def test_a_nested_model_that_is_told_how_to_run(training):
    """Dropout runs where the nested model was called with `training=True`."""
    inputs = keras.Input((4,))
    body = base(rate=0.9)
    x = body(inputs, training=training)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    without = value(model.get_layer("head")(body(X)))
    found = chain(cut_model(model), X)
    if training:
        assert np.abs(found - without).max() > 1e-3
    else:
        close_in_ulps(found, without)


@pytest.mark.filterwarnings("ignore:Layer 'base'")
def test_a_nested_model_called_with_a_mask():
    body = base()
    inputs, mask = keras.Input((4,)), keras.Input((), dtype="bool")
    model = keras.Model([inputs, mask], body(inputs, mask=mask))
    with pytest.raises(ValueError, match="without a mask as an argument"):
        cut_model(model)


@pytest.mark.parametrize("how", HOW)
def test_keep_blocks_of_nested_models(how):
    model = nested(how)
    small = keep_blocks(model, 2)
    assert names(find_blocks(small)[1]) == [["body_0"], ["body_1"]]
    assert not {id(w) for w in small.weights} & {id(w) for w in model.weights}
    # By zeros in the block that is left out: x + tanh(0) = x.
    block = find_blocks(model)[1][2].layers[0]
    block.set_weights([0 * w for w in block.get_weights()])
    close_in_ulps(value(small(data(model))), value(model(data(model))))


def test_rearranged():
    """By calling the layers: blocks 1, 0, 0, not copied."""
    model = base()
    get = model.get_layer
    new = rearranged(model, [1, 0, 0])
    x = get("embedding")(X)
    for name in ("body_1", "body_0", "body_0"):
        x = get(name)(x)
    close_in_ulps(value(new(X)), value(get("pool")(x)))
    assert {id(w) for w in new.weights} < {id(w) for w in model.weights}
    assert names(find_blocks(new)[1]) == [["body_1"], ["body_0"], ["body_0"]]
    for order in ([], [3], [-1], [1.0], [True], ["a"]):
        with pytest.raises(ValueError, match="numbers of the model's 3 blocks"):
            rearranged(model, order)
        with pytest.raises(ValueError, match=r"Expected .*Received"):
            keep_blocks(model, order)
    kept = keep_blocks(model, np.array([0, 2]))
    assert names(find_blocks(kept)[1]) == [["body_0"], ["body_2"]]
    for keep in (0, 4, 1.0, True, "2", None):
        with pytest.raises(ValueError, match=r"Expected .*Received"):
            keep_blocks(model, keep)


def test_a_copy_keeps_the_functions_of_lambda_layers():
    """Also those that refer to something else, in a nested model too."""
    offset = np.float32(3)
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Lambda(lambda x: x + offset)]
    )
    inner.add(layers.Dense(5))
    inputs = keras.Input((4,))
    x = layers.Lambda(lambda x: x[:, :2] * offset)(inner(inputs))
    model = keras.Model(inputs, layers.Dense(1)(x))
    copy = copied(model)
    np.testing.assert_array_equal(value(copy(X)), value(model(X)))
    for variable in copy.weights:
        variable.assign(np.zeros(variable.shape))
    assert not value(copy(X)).any()
    assert value(model(X)).all()


def test_bad_arguments():
    for blocks, count in ((12, 0), (12, 13), (12, 1.0), ("12", 3), (True, 1)):
        with pytest.raises(ValueError, match=r"Expected .*Received"):
            spaced_blocks(blocks, count)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    for model in (plain, keras.Sequential([layers.Dense(2)]), "bert", None):
        with pytest.raises(ValueError, match=r"Expected|Found no blocks"):
            cut_model(model)
    with pytest.raises(ValueError, match="numbers of the model's 0 blocks"):
        keep_blocks(base(), 1, ["embedding"])
