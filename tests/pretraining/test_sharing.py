"""Shared and un-shared layers, the factorized embedding, layer-wise rates.

Post 7846.
"""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import JAX, TENSORFLOW, slow_on_jax, slow_on_tensorflow, value

import blogkeras

VOCABULARY, DIM = 30, 6
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (4, 8)).astype("int32")


def transformer(blocks=4, shared=False, dim=DIM, embedding_dim=None):
    """A transformer of the functional API, or ALBERT's."""
    ids = keras.Input((8,), dtype="int32", name="token_ids")
    h = layers.Embedding(VOCABULARY, embedding_dim or dim, name="table")(ids)
    if embedding_dim:
        h = layers.Dense(dim, name="widen")(h)
    block = None
    for i in range(blocks):
        if block is None or not shared:
            block = [
                layers.MultiHeadAttention(2, 3, name=f"block_{i}_attention"),
                layers.Add(name=f"block_{i}_add"),
                layers.LayerNormalization(name=f"block_{i}_norm"),
            ]
        attention, add, norm = block
        h = norm(add([h, attention(h, h)]))
    return keras.Model(ids, layers.Dense(2, name="head")(h), name="toy")


def boundaries(model):
    """Before the first block, and after each: by the symbolic tensors."""
    table = model.get_layer("table")
    norms = [x for x in model.layers if "norm" in x.name]
    ends = [n.outputs[0] for x in norms for n in x._inbound_nodes]
    return [table.output, *ends]


def difference(one, other):
    return max(
        np.abs(value(one(IDS)) - value(other(IDS))).max(),
        np.abs(
            one.predict(IDS, verbose=0) - other.predict(IDS, verbose=0)
        ).max(),
    )


@slow_on_jax
def test_unsharing_is_exact_and_gives_weights_of_their_own():
    albert = transformer(shared=True)
    for norm in albert.get_layer("block_0_norm").weights:
        norm.assign(np.random.default_rng(1).normal(size=norm.shape))
    bert = blogkeras.unshare_layers(albert, boundaries(albert))
    assert difference(albert, bert) == 0
    block = sum(
        albert.get_layer(f"block_0_{n}").count_params()
        for n in ("attention", "norm")
    )
    assert bert.count_params() == albert.count_params() + 3 * block
    ours = {id(v) for v in albert.variables}
    assert not ours & {id(v) for v in bert.variables}
    again = blogkeras.share_layers(bert, boundaries=boundaries(bert))
    assert difference(albert, again) == 0
    assert again.count_params() == albert.count_params()
    assert len(again.weights) == len(albert.weights)


def test_sharing_takes_the_first_the_mean_or_what_is_given():
    bert = transformer()
    cuts = boundaries(bert)
    first = blogkeras.share_layers(bert, boundaries=cuts)
    mean = blogkeras.share_layers(bert, "mean", boundaries=cuts)
    kernels = [
        [value(w) for w in bert.get_layer(f"block_{i}_attention").weights]
        for i in range(4)
    ]
    assert difference(bert, first) > 0
    for i, w in enumerate(first.get_layer("block_0_attention").weights):
        np.testing.assert_array_equal(value(w), kernels[0][i])
    for i, w in enumerate(mean.get_layer("block_0_attention").weights):
        np.testing.assert_allclose(
            value(w), np.mean([k[i] for k in kernels], 0), rtol=1e-6
        )
    norm = [value(w) for w in bert.get_layer("block_2_norm").weights]
    given = blogkeras.share_layers(
        bert, [[*kernels[2], *norm]], boundaries=cuts
    )
    for i, w in enumerate(given.get_layer("block_0_attention").weights):
        np.testing.assert_array_equal(value(w), kernels[2][i])
    # Equal layers are shared exactly.
    for i in range(1, 4):
        for name in ("attention", "norm"):
            bert.get_layer(f"block_{i}_{name}").set_weights(
                bert.get_layer(f"block_0_{name}").get_weights()
            )
    mean = blogkeras.share_layers(bert, "mean", boundaries=cuts)
    assert difference(bert, mean) < 1e-6
    first = blogkeras.share_layers(bert, boundaries=cuts)
    assert difference(bert, first) == 0


@pytest.mark.parametrize(
    ("groups", "inner", "order"),
    [(2, 1, [0, 0, 2, 2]), (1, 2, [0, 1, 0, 1]), (2, 2, [0, 1, 2, 3])],
)
def test_groups_and_inner_repetitions(groups, inner, order):
    bert = transformer()
    shared = blogkeras.share_layers(
        bert, groups=groups, inner=inner, boundaries=boundaries(bert)
    )
    h = bert.get_layer("table")(IDS)
    for i in order:
        parts = [
            bert.get_layer(f"block_{i}_{n}")
            for n in ("attention", "add", "norm")
        ]
        h = parts[2](parts[1]([h, parts[0](h, h)]))
    h = bert.get_layer("head")(h)
    np.testing.assert_array_equal(value(shared(IDS)), value(h))


def blocks_of(*layers_of_blocks):
    """A model whose blocks are what the functions compute."""
    ids = keras.Input((8,), dtype="int32")
    h = layers.Embedding(VOCABULARY, DIM)(ids)
    for i, block in enumerate(layers_of_blocks):
        h = block(i)(h)
    return keras.Model(ids, h)


def test_blocks_that_compute_different_things_are_not_shared():
    """Their weights may be equal in sizes, and in values too."""

    def dense(activation, initializer="ones"):
        return lambda i: layers.Dense(
            DIM,
            activation,
            kernel_initializer=initializer,
            name=f"transformer_layer_{i}",
        )

    def inside(first, second):
        def block(i):
            inputs = keras.Input((8, DIM))
            one = layers.Dense(DIM, kernel_initializer="ones")
            two = layers.Dense(DIM, kernel_initializer="ones")
            h = second(two(first(one(inputs))))
            return keras.Model(inputs, h, name=f"transformer_layer_{i}")

        return block

    relu, tanh, none = ops.relu, ops.tanh, lambda x: x
    for model in (
        blocks_of(dense("relu"), dense("tanh")),
        blocks_of(inside(relu, none), inside(tanh, none)),
        blocks_of(inside(relu, none), inside(none, relu)),
    ):
        with pytest.raises(ValueError, match="same layers, options and sizes"):
            blogkeras.share_layers(model)
    # Of large arrays not all is printed.
    ids = keras.Input((8,), dtype="int32")
    h = layers.Embedding(VOCABULARY, 2000)(ids)
    ends = [h]
    for i in range(2):
        offset = np.zeros(2000, "float32")
        offset[1000] = i
        h = layers.LayerNormalization()(h + offset)
        ends.append(h)
    with pytest.raises(ValueError, match="other options or links"):
        blogkeras.share_layers(keras.Model(ids, h), boundaries=ends)
    # In turn they can be shared, and what differs in training alone can be.
    model = blocks_of(*[dense("relu"), dense("tanh")] * 2)
    twin = blogkeras.share_layers(model, inner=2)
    expected = value(model(ops.convert_to_tensor(IDS)))
    np.testing.assert_array_equal(
        value(twin(ops.convert_to_tensor(IDS))), expected
    )
    blogkeras.share_layers(
        blocks_of(dense("relu"), dense("relu", "zeros")), "mean"
    )
    blogkeras.share_layers(blocks_of(inside(relu, tanh), inside(relu, tanh)))


def test_a_mask_that_the_first_block_makes_for_all():
    """Boundaries put its operations into that block."""
    ids = keras.Input((8,), dtype="int32")
    h = layers.Embedding(VOCABULARY, DIM)(ids)
    mask = ops.not_equal(ids, 0)[:, None, :]
    ends = [h]
    for _ in range(3):
        a = layers.MultiHeadAttention(2, 3)(h, h, attention_mask=mask)
        h = layers.LayerNormalization()(h + layers.Dropout(0.1)(a))
        ends.append(h)
    model = keras.Model(ids, h)
    albert = blogkeras.share_layers(model, boundaries=ends)
    block = sum(w.size for x in model.layers[-3:] for w in x.get_weights())
    assert albert.count_params() == VOCABULARY * DIM + block
    bert = blogkeras.unshare_layers(
        albert, [albert.layers[1].output, *_norms(albert)]
    )
    x = ops.convert_to_tensor(IDS)
    np.testing.assert_array_equal(value(bert(x)), value(albert(x)))


def _norms(model):
    (norm,) = (x for x in model.layers if "normalization" in x.name)
    return [n.outputs[0] for n in norm._inbound_nodes if n.outputs]


@slow_on_jax
def test_saved_and_trained(tmp_path):
    bert = transformer()
    shared = blogkeras.share_layers(bert, boundaries=boundaries(bert))
    shared.compile("sgd", "mse", jit_compile=False)
    shared.fit(IDS, np.zeros((4, 8, 2)), verbose=0)
    shared.save(tmp_path / "shared.keras")
    loaded = keras.saving.load_model(tmp_path / "shared.keras")
    assert difference(shared, loaded) == 0


def test_operations_stay_and_the_file_shrinks():
    """The blocks of ALBERT cost what BERT's cost."""
    if not JAX:
        pytest.skip("JAX counts operations")
    import jax

    albert = transformer(shared=True)
    bert = blogkeras.unshare_layers(albert, boundaries(albert))

    def flops(model):
        def run(values, ids):
            return model.stateless_call(values, [], ids)[0]

        values = [v.value for v in model.trainable_variables]
        return jax.jit(run).lower(values, IDS).cost_analysis()["flops"]

    assert flops(albert) == flops(bert)


@pytest.mark.verify
def test_the_file_of_albert_is_four_times_smaller(tmp_path):
    """12 × 256, V 21128, E 128: 14.9 and 3.5 million weights."""
    dim = 256
    ids = keras.Input((8,), dtype="int32")
    h = layers.Embedding(21128, dim)(ids)
    ends = [h]
    for _ in range(12):
        h = layers.LayerNormalization()(
            h + layers.MultiHeadAttention(4, dim // 4)(h, h)
        )
        f = layers.Dense(dim)(layers.Dense(4 * dim, "gelu")(h))
        h = layers.LayerNormalization()(h + f)
        ends.append(h)
    bert = keras.Model(ids, h)
    albert = blogkeras.share_layers(bert, boundaries=ends)
    albert, _ = blogkeras.factorize_embedding(albert, 128)
    # A block: attention and its norm; two dense layers and their norm.
    block = 4 * (dim * dim + dim) + 2 * dim
    block += 2 * 4 * dim * dim + 4 * dim + dim + 2 * dim
    assert bert.count_params() == 21128 * dim + 12 * block
    assert albert.count_params() == 21128 * 128 + 128 * dim + block
    sizes = []
    for model in (bert, albert):
        path = tmp_path / "model.weights.h5"
        model.save_weights(path, overwrite=True)
        sizes.append(path.stat().st_size)
    assert sizes[0] / sizes[1] >= 4


def test_the_factorized_embedding_is_the_best_of_its_size():
    bert = transformer()
    table = value(bert.get_layer("table").embeddings, "float64")
    small, error = blogkeras.factorize_embedding(bert, 2)
    u, s, v = np.linalg.svd(table, full_matrices=False)
    best = u[:, :2] * s[:2] @ v[:2]
    narrow = value(small.get_layer("table").embeddings, "float64")
    kernel = value(small.get_layer("table_projection").kernel, "float64")
    np.testing.assert_allclose(narrow @ kernel, best, atol=1e-6)
    assert error == pytest.approx(
        np.linalg.norm(table - best) / np.linalg.norm(table), rel=1e-6
    )
    full, error = blogkeras.factorize_embedding(bert, DIM)
    assert error == 0
    assert difference(bert, full) < 1e-5
    assert small.count_params() == (
        bert.count_params() - VOCABULARY * DIM + 2 * (VOCABULARY + DIM)
    )


def named(blocks=2):
    """A transformer whose blocks are found by their names."""
    ids = keras.Input((8,), dtype="int32", name="token_ids")
    h = layers.Embedding(VOCABULARY, DIM, name="table")(ids)
    for i in range(blocks):
        h = layers.Dense(DIM, name=f"transformer_layer_{i}")(h)
    return keras.Model(ids, layers.Dense(2, name="head")(h))


def assert_loaded_trains_alike(model, folder):
    model.save(folder / "model.keras")
    loaded = keras.saving.load_model(folder / "model.keras")
    for each in (model, loaded):
        each.fit(IDS, np.ones((4, 8, 2)), verbose=0)
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(value(ours), value(theirs), rtol=1e-5)


def test_layerwise_rates(tmp_path):
    model = named()
    optimizer = blogkeras.layerwise_optimizer(
        model, keras.optimizers.SGD(0.5), decay=0.5
    )
    model.compile(optimizer, "mse", jit_compile=False)
    before = {w.path: value(w) for w in model.trainable_variables}
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    for each in (model, twin):
        each.fit(IDS, np.ones((4, 8, 2)), verbose=0)
    # The head's rate is the optimizer's; the table lies 3 deeper.
    for name, depth in (
        ("head", 0),
        ("transformer_layer_1", 1),
        ("transformer_layer_0", 2),
        ("table", 3),
    ):
        ours, theirs = (m.get_layer(name).weights[0] for m in (model, twin))
        start = before[ours.path]
        np.testing.assert_allclose(
            value(ours) - start,
            0.5**depth * (value(theirs) - start),
            rtol=1e-4,
            atol=1e-7,
        )
    assert_loaded_trains_alike(model, tmp_path)


def test_layerwise_rates_of_a_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.5)
    optimizer = blogkeras.layerwise_optimizer(
        named(), keras.optimizers.AdamW(schedule), decay=0.1
    )
    rates = [float(o._learning_rate(10)) for o in optimizer.optimizers]
    np.testing.assert_allclose(rates, [0.5, 0.05, 0.005, 0.0005], rtol=1e-6)


def updates(model, boundaries=None):
    """How far one step of all-ones gradients moves each layer's weights."""
    optimizer = blogkeras.layerwise_optimizer(
        model, keras.optimizers.SGD(1.0), 0.5, boundaries
    )
    weights = model.trainable_variables
    before = [value(w) for w in weights]
    optimizer.apply([ops.ones(w.shape) for w in weights], weights)
    return {
        layer.name: np.unique(
            [
                np.round((b - value(w)).mean(), 4)
                for w, b in zip(weights, before, strict=True)
                if any(w is v for v in layer.variables)
            ]
        ).tolist()
        for layer in model.layers
        if layer.variables
    }


def test_layerwise_rates_of_given_boundaries():
    model = transformer(blocks=3)
    moved = updates(model, boundaries=boundaries(model))
    assert moved == {
        "table": [0.0625],
        **{f"block_{i}_attention": [0.5 ** (3 - i)] for i in range(3)},
        **{f"block_{i}_norm": [0.5 ** (3 - i)] for i in range(3)},
        "head": [1.0],
    }
    albert = transformer(blocks=3, shared=True)
    moved = updates(albert, boundaries=boundaries(albert))
    assert moved == {
        "table": [0.0625],
        "block_0_attention": [0.5],
        "block_0_norm": [0.5],
        "head": [1.0],
    }


def test_layerwise_rates_of_relative_positions_and_side_inputs():
    ids = keras.Input((8,), dtype="int32")
    side = keras.Input((8, 2))
    h = layers.Embedding(VOCABULARY, DIM, name="table")(ids)
    positions = layers.Dense(DIM, name="positions")(ops.one_hot(ids, 3))
    for i in range(2):
        block = layers.MultiHeadAttention(1, 3, name=f"transformer_layer_{i}")
        h = block(h, positions)
    h = layers.Concatenate()([h, layers.Dense(3, name="wide")(side)])
    model = keras.Model([ids, side], layers.Dense(2, name="head")(h))
    ends = ["table", "transformer_layer_0", "transformer_layer_1"]
    # What lies between given boundaries belongs to the block there.
    for given, rate in (
        (None, 0.125),
        (ends, 0.25),
        (np.array(ends), 0.25),
    ):
        assert updates(model, boundaries=given) == {
            "table": [0.125],
            "positions": [rate],
            "transformer_layer_0": [0.25],
            "transformer_layer_1": [0.5],
            "wide": [1.0],
            "head": [1.0],
        }


def test_layerwise_rates_keep_what_is_not_decayed():
    model = named()
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    table = model.get_layer("table").embeddings
    optimizer.exclude_from_weight_decay([table], ["bias"])
    model.compile(blogkeras.layerwise_optimizer(model, optimizer, 1.0), "mse")
    before = {w.path: value(w) for w in model.trainable_variables}
    weights = np.zeros((4, 8))
    model.fit(IDS, np.ones((4, 8, 2)), sample_weight=weights, verbose=0)
    for w in model.trainable_variables:
        is_kernel = w.name == "kernel"
        expected = before[w.path] * (1 - 0.1 * 0.5 if is_kernel else 1)
        np.testing.assert_allclose(value(w), expected, rtol=1e-6)


@slow_on_tensorflow
def test_layerwise_rates_inside_of_a_guard(tmp_path):
    def make(guard):
        model = keras.models.clone_model(named())
        model.set_weights(start)
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        model.compile(
            blogkeras.layerwise_optimizer(model, guard(optimizer), 0.5),
            "mse",
            jit_compile=False,
        )
        return model

    def fit(model, number=1.0):
        model.fit(IDS, np.full((4, 8, 2), number), verbose=0)

    def check(one, other):
        for ours, theirs in zip(one.weights, other.weights, strict=True):
            np.testing.assert_allclose(value(ours), value(theirs), rtol=1e-5)

    start = named().get_weights()
    plain = make(lambda optimizer: optimizer)
    guarded = make(lambda inner: blogkeras.SkipNonFinite(inner, "guard"))
    assert guarded.optimizer.name == "guard"
    fit(plain)
    fit(guarded)
    # All depths drop a step together.
    fit(guarded, np.nan)
    assert int(guarded.optimizer.skipped) == 1
    check(plain, guarded)
    guarded.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.skipped) == 1
    # A file does not say what is excluded from weight decay.
    for optimizer in loaded.optimizer.inner_optimizer.optimizers:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    for model in (plain, guarded, loaded):
        fit(model)
    check(plain, guarded)
    check(guarded, loaded)


@keras.saving.register_keras_serializable(package="toy")
class TransformerBlock(layers.Layer):
    """Layers inside of it get other names when Keras loads it."""

    def build(self, shape):
        self.dense = layers.Dense(shape[-1])
        self.dense.build(shape)

    def call(self, x):
        return x + self.dense(x)


def unnamed():
    ids = keras.Input((8,), dtype="int32")
    h = layers.Embedding(VOCABULARY, DIM)(ids)
    for _ in range(2):
        h = TransformerBlock()(h)
    return keras.Model(ids, layers.Dense(2)(h))


def moved(model):
    """How far a step of all-ones gradients moves each variable."""
    before = [value(v) for v in model.trainable_variables]
    model.optimizer.apply(
        [ops.ones(v.shape) for v in model.trainable_variables],
        model.trainable_variables,
    )
    pairs = zip(before, model.trainable_variables, strict=True)
    return [np.round((b - value(v)).mean(), 4) for b, v in pairs]


# Table, kernel and bias of the blocks, and of the head.
HALVED = [0.125, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("guarded", [False, True])
def test_layerwise_rates_of_a_loaded_model(guarded, tmp_path):
    model = unnamed()
    optimizer = keras.optimizers.SGD(1.0)
    if guarded:
        optimizer = blogkeras.SkipNonFinite(optimizer)
    model.compile(blogkeras.layerwise_optimizer(model, optimizer, 0.5), "mse")
    # Before it is built, and after.
    for name in ("new.keras", "trained.keras"):
        model.save(tmp_path / name)
        loaded = keras.saving.load_model(tmp_path / name)
        assert moved(loaded) == HALVED
        assert moved(model) == HALVED


def test_layerwise_rates_keep_the_state_of_a_loaded_model(tmp_path):
    model = unnamed()
    optimizer = blogkeras.layerwise_optimizer(model, keras.optimizers.Adam())
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(IDS, np.ones((4, 8, 2)), verbose=0)
    assert_loaded_trains_alike(model, tmp_path)


def test_layerwise_rates_of_what_is_trained_then(tmp_path):
    """A part is frozen, or trained inside of another model, or a copy."""
    model = unnamed()
    sgd = keras.optimizers.SGD(1.0)
    optimizer = blogkeras.layerwise_optimizer(model, sgd, 0.5)
    model.layers[1].trainable = False
    model.compile(optimizer, "mse")
    assert moved(model) == HALVED[1:]
    model = unnamed()
    around = keras.Sequential(
        [keras.Input((8,), dtype="int32"), model, layers.Dense(3)]
    )
    optimizer = blogkeras.layerwise_optimizer(model, sgd, 0.5)
    around.compile(optimizer, "mse")
    assert moved(around) == [*HALVED, 1.0, 1.0]
    around.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert moved(loaded) == [*HALVED, 1.0, 1.0]
    optimizer = blogkeras.layerwise_optimizer(model, sgd, 0.5)
    copy = keras.models.clone_model(model)
    copy.compile(optimizer, "mse")
    assert moved(copy) == HALVED
    optimizer = blogkeras.layerwise_optimizer(model, sgd, 0.5)
    with pytest.raises(ValueError, match="make it anew"):
        optimizer.build(copy.trainable_variables[1:])


def test_layerwise_rates_need_a_new_keras(monkeypatch):
    monkeypatch.delattr(keras.optimizers, "MultiOptimizer")
    with pytest.raises(ImportError, match="MultiOptimizer"):
        blogkeras.layerwise_optimizer(named(), keras.optimizers.SGD())


def one():
    return 1.0


def frozen(model):
    model.trainable = False
    return model


def quantized(model):
    model.get_layer("table").quantize("int8")
    return model


def test_lambda_in_a_shared_block():
    ids = keras.Input((8,), dtype="int32")
    h = layers.Embedding(VOCABULARY, DIM)(ids)
    dense, half = layers.Dense(DIM), layers.Lambda(lambda x: x / 2)
    ends = [h]
    for _ in range(2):
        ends.append(half(dense(ends[-1])))
    albert = keras.Model(ids, ends[-1])
    bert = blogkeras.unshare_layers(albert, ends)
    assert bert.count_params() - albert.count_params() == DIM * (DIM + 1)
    assert difference(albert, bert) == 0


class Marked(layers.Layer):
    """Adds numbers where there are some."""

    def call(self, x, marks=None):
        if marks is None:
            return x
        return x + ops.cast(marks, x.dtype)[..., None]

    def compute_output_spec(self, x, marks=None):
        return keras.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize(
    "change",
    [
        blogkeras.unshare_layers,
        lambda model: blogkeras.share_layers(model, groups=2),
        lambda model: blogkeras.factorize_embedding(model, DIM)[0],
    ],
    ids=["unshare", "share", "factorize"],
)
def test_inputs_stay_optional(change):
    ids = keras.Input((8,), dtype="int32", name="token_ids")
    marks = keras.Input((8,), dtype="int32", name="marks", optional=True)
    h = Marked()(layers.Embedding(VOCABULARY, DIM, name="table")(ids), marks)
    for i in range(2):
        h = layers.Dense(DIM, name=f"transformer_layer_{i}")(h)
    model = keras.Model({"token_ids": ids, "marks": marks}, h)
    changed = change(model)
    for given in (None, IDS):
        inputs = {"token_ids": IDS, "marks": given}
        np.testing.assert_allclose(
            value(changed(inputs)), value(model(inputs)), atol=1e-6
        )


def test_factorized_twice_frozen_and_with_lora():
    once, _ = blogkeras.factorize_embedding(named(), 4)
    twice, _ = blogkeras.factorize_embedding(once, 2)
    assert twice.get_layer("table").output_dim == 2
    model = named()
    model.get_layer("table").trainable = False
    small, _ = blogkeras.factorize_embedding(model, 4)
    assert not [v for v in small.trainable_variables if "table" in v.path]
    model = named()
    model.get_layer("table").enable_lora(2)
    small, error = blogkeras.factorize_embedding(model, DIM)
    assert error < 1e-6
    np.testing.assert_allclose(value(small(IDS)), value(model(IDS)), atol=1e-6)


def test_lists_as_the_source_of_shared_layers():
    model = named()
    kernel, bias = np.eye(DIM).tolist(), [0.5] * DIM
    shared = blogkeras.share_layers(model, [[kernel, bias]])
    found = shared.get_layer("transformer_layer_0").get_weights()
    np.testing.assert_array_equal(found[0], kernel)
    np.testing.assert_array_equal(found[1], bias)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blogkeras.share_layers(named(), "last"), "source"),
        (lambda: blogkeras.share_layers(named(), groups=0), "groups"),
        (lambda: blogkeras.share_layers(named(3), groups=2), "divides"),
        (lambda: blogkeras.share_layers(named(), inner=1.0), "inner"),
        (lambda: blogkeras.share_layers(named(), [[], []]), "source"),
        (lambda: blogkeras.share_layers(named(), [[np.ones(3)]]), "shapes"),
        (lambda: blogkeras.share_layers("bert"), "functional"),
        (lambda: blogkeras.share_layers(transformer()), "boundaries"),
        (lambda: blogkeras.unshare_layers(None), "functional"),
        (lambda: blogkeras.factorize_embedding(named(), 0), "size"),
        (lambda: blogkeras.factorize_embedding(named(), 7), "size"),
        (
            lambda: blogkeras.factorize_embedding(named(), 2, "head"),
            "Embedding",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(named(), "adam"),
            "optimizer",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(), keras.optimizers.SGD(global_clipnorm=1.0)
            ),
            "clipnorm",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(), keras.optimizers.SGD(one)
            ),
            "schedule",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(),
                keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            ),
            "loss scale",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(),
                blogkeras.SkipNonFinite(
                    keras.optimizers.SGD(global_clipnorm=1.0)
                ),
            ),
            "without `global_clipnorm`",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(),
                keras.optimizers.MultiOptimizer(
                    keras.optimizers.OptimizerMap(keras.optimizers.SGD())
                ),
            ),
            "one optimizer.*MultiOptimizer",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                frozen(named()), keras.optimizers.SGD()
            ),
            "frozen",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                transformer(), keras.optimizers.SGD()
            ),
            "Give `boundaries`",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                transformer(), keras.optimizers.SGD(), boundaries=["table"]
            ),
            "two boundaries",
        ),
        (lambda: blogkeras.share_layers(named(), [5]), "list of arrays"),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(), keras.optimizers.SGD(loss_scale_factor=8.0)
            ),
            "loss_scale_factor",
        ),
        (
            lambda: blogkeras.factorize_embedding(quantized(named()), 2),
            "int8",
        ),
        (
            lambda: blogkeras.layerwise_optimizer(
                named(), keras.optimizers.SGD(), 1.5
            ),
            "decay",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not TENSORFLOW, reason="bert4keras runs on TensorFlow")
def test_bert4keras():
    def build(model):
        return toy.bert4keras_transformer(
            model=model,
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            num_hidden_layers=4,
        )

    albert = build("albert")
    bert = blogkeras.unshare_layers(albert)
    inputs = [ops.convert_to_tensor(IDS), ops.zeros(IDS.shape, "int32")]
    expected = value(albert(inputs))
    np.testing.assert_array_equal(value(bert(inputs)), expected)
    # Its layers are those of bert4keras's own un-shared model.
    theirs = build("albert_unshared")
    ours, names = ({x.name for x in m.layers} for m in (bert, theirs))
    assert ours == names
    ours, shapes = (
        sorted(tuple(w.shape) for w in m.weights) for m in (bert, theirs)
    )
    assert ours == shapes
    groups = blogkeras.share_layers(bert, groups=2)
    np.testing.assert_array_equal(value(groups(inputs)), expected)
    again = blogkeras.unshare_layers(groups)
    np.testing.assert_array_equal(value(again(inputs)), expected)


@slow_on_jax
def test_kerashub():
    keras_hub = pytest.importorskip("keras_hub")
    albert = keras_hub.models.AlbertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=4,
        num_heads=2,
        embedding_dim=4,
        hidden_dim=DIM,
        intermediate_dim=8,
        num_groups=2,
        max_sequence_length=8,
    )
    inputs = {
        "token_ids": IDS,
        "segment_ids": np.zeros_like(IDS),
        "padding_mask": np.ones_like(IDS),
    }
    inputs = {k: ops.convert_to_tensor(v) for k, v in inputs.items()}
    bert = blogkeras.unshare_layers(albert)
    again = blogkeras.share_layers(bert, groups=2)
    for name, expected in albert(inputs).items():
        np.testing.assert_array_equal(value(bert(inputs)[name]), expected)
        np.testing.assert_array_equal(value(again(inputs)[name]), expected)
    assert bert.count_params() > albert.count_params() == again.count_params()
