"""Theseus: detaching, freezing, cuts, masks, saving (post 7575)."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import close_in_ulps, slow_on_tensorflow, value
from theseus_parts import (
    X,
    Y,
    built,
    dense,
    no_gradient,
    two_modules,
)

from blogkeras.graph import copied
from blogkeras.theseus import (
    Distillation,
    LinearReplacement,
    ModuleReplacement,
    Theseus,
    cut_model,
    keep_blocks,
    spaced_blocks,
)


def test_configurations_revive():
    options = {
        "mode": "mixing",
        "train_shared": True,
        "predecessor_dropout": True,
        "seed": 3,
    }
    rate = LinearReplacement(0.1, 0.2)
    theseus = Theseus([dense()], [dense()], dense(), rate, **options)
    again = Theseus.from_config(theseus.get_config())
    assert again.replacement_rate.get_config() == rate.get_config()
    assert {name: getattr(again, name) for name in options} == options
    options = {"temperature": 3.0, "weight": 0.1, "from_logits": True}
    distillation = Distillation(dense(), dense(), **options)
    again = Distillation.from_config(distillation.get_config())
    assert {name: getattr(again, name) for name in options} == options


def test_predict_is_the_successor_and_detach_gives_it(tmp_path):
    theseus = two_modules(rate=0.0)
    expected = X
    for layer in [*theseus.successor_modules, theseus.head]:
        expected = layer(expected)
    close_in_ulps(theseus(X), value(expected))
    assert not theseus.head.trainable
    model = theseus.detach()
    close_in_ulps(value(model(X)), value(expected))
    assert type(model) is keras.Model or "Functional" in type(model).__name__
    ours = {w.path for m in theseus.predecessor_modules[0] for w in m.weights}
    assert not ours & {w.path for w in model.weights}
    assert all(layer.trainable for layer in model.layers)
    model.save(tmp_path / "successor.keras")
    text = str(keras.saving.serialize_keras_object(model))
    assert "blogkeras" not in text.replace("blogkeras>ActivityLoss", "")


class Gather(layers.Layer):
    """Of several tensors one; Keras has to find out its shape."""

    def __init__(self, names, **kwargs):
        super().__init__(**kwargs)
        self.names = names
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape[self.names[0]])

    def call(self, x):
        return self.dense(x[self.names[0]]) + x[self.names[1]]


@slow_on_tensorflow
@no_gradient
@pytest.mark.parametrize("names", ["ab", (0, 1)])
def test_several_inputs(names):
    inputs = {"a": X, "b": X} if names == "ab" else [X, X]
    old, new = Gather(names), Gather(names)
    old.build({n: X.shape for n in names})
    head = built(layers.Dense(3, "softmax"), 3)
    theseus = toy.compiled(Theseus([old], [new], head))
    theseus.fit(inputs, Y, verbose=0)
    np.testing.assert_allclose(
        theseus.detach().predict(inputs, verbose=0),
        theseus.predict(inputs, verbose=0),
        atol=1e-6,
    )


@slow_on_tensorflow
@no_gradient
def test_detaching_while_it_learns_changes_nothing():
    found = []
    for looking in (False, True):
        toy.reset()
        theseus = two_modules()
        head = toy.weights(theseus.head)
        toy.compiled(theseus, keras.optimizers.Adam(0.01))
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, model=theseus: model.detach()
        )
        callbacks = [look] if looking else []
        for _ in "ab":
            theseus.fit(
                X, Y, batch_size=8, epochs=2, callbacks=callbacks, verbose=0
            )
        assert toy.difference(head, toy.weights(theseus.head)) == 0
        found.append(toy.weights(theseus))
    assert toy.difference(*found) == 0


@slow_on_tensorflow
@no_gradient
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
def test_a_detached_copy_may_be_quantized():
    """And what it was detached from is trained on."""
    head = built(layers.Dense(3, "softmax"), 3)
    theseus = Theseus([dense()], [dense()], head, 1.0)
    toy.compiled(theseus, run_eagerly=True)
    theseus.fit(X, Y, verbose=0)
    expected = value(theseus(X))
    small = theseus.detach(copy=True)
    close_in_ulps(value(small(X)), expected)
    assert len(small.trainable_variables) == 4
    assert not theseus.head.trainable
    assert not {id(w) for w in small.weights} & {id(w) for w in theseus.weights}
    small.quantize("int8")
    np.testing.assert_allclose(value(small(X)), expected, atol=0.05)
    close_in_ulps(value(theseus(X)), expected)
    theseus.fit(X, Y, verbose=0)
    assert np.abs(value(theseus(X)) - expected).max() > 0
    with pytest.raises(ValueError, match="Received: copy=1"):
        theseus.detach(copy=1)


def test_what_was_frozen_learns_again_and_only_that(tmp_path):
    """In a detached, copied, reloaded or newly replaced model."""
    head = keras.Sequential([keras.Input((3,)), dense(name="h"), dense()])
    head.layers[1].trainable = False
    for shared in (False, True):
        Theseus([dense()], [dense()], head)  # freezes it
        theseus = Theseus([dense()], [dense()], head, train_shared=shared)
        theseus.compile("sgd", "mse")
        count = 4 if shared else 2  # a kernel and a bias each
        assert len(theseus.trainable_variables) == count
        theseus.predict(X, verbose=0)
        theseus.save(tmp_path / "theseus.keras")
        loaded = keras.saving.load_model(tmp_path / "theseus.keras")
        assert len(loaded.trainable_variables) == count
        for model in (theseus, loaded):
            assert len(copied(model.head).trainable_variables) == 2
            small = model.detach()
            assert len(small.trainable_variables) == 4
            assert not small.get_layer(head.name).layers[1].trainable
            old = model.predecessor_modules[0]
            assert not old.trainable
            old.trainable = True  # the user's word counts
            assert old.trainable_variables
    head.trainable = False
    small = Theseus([dense()], [dense()], head).detach(keras.Input((3,)))
    assert not small.layers[-1].trainable


def test_the_rate_can_be_set():
    theseus = two_modules(rate=0.5)
    theseus.replacement_rate = 1.0
    assert [m.replacement_rate for m in theseus.replacements] == [1.0, 1.0]
    assert theseus.get_config()["replacement_rate"] == 1.0
    with pytest.raises(ValueError, match="Received: replacement_rate=2"):
        theseus.replacement_rate = 2


@slow_on_tensorflow
@no_gradient
@pytest.mark.parametrize(
    "mode", ["batch", pytest.param("sample", marks=pytest.mark.verify)]
)
def test_half_precision_sample_weights_and_checkpoints(mode, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    theseus = two_modules(mode=mode)
    toy.compiled(theseus, keras.optimizers.Adam(0.01))
    best = tmp_path / "best.weights.h5"
    theseus.fit(
        X,
        Y,
        sample_weight=toy.WEIGHTS[:16],
        validation_data=(X, Y),
        callbacks=[
            keras.callbacks.ModelCheckpoint(
                best, save_weights_only=True, monitor="loss"
            )
        ],
        batch_size=8,
        verbose=0,
    )
    assert best.exists()
    assert all(np.isfinite(w).all() for w in theseus.get_weights())
    assert all(w.dtype == "float32" for w in theseus.trainable_weights)


def test_a_layer_in_full_precision_gets_its_inputs_so():
    keras.config.set_dtype_policy("mixed_bfloat16")
    old, new = dense(dtype="float32"), dense(dtype="float32")
    expected = value(new(X))
    for model in (ModuleReplacement(old, new), Theseus([old], [new])):
        close_in_ulps(value(model(X)), expected)


@no_gradient
def test_stem_and_head_learn_if_told():
    stem = dense(name="stem")
    theseus = Theseus(
        [dense()], [dense()], [dense()], stem=stem, train_shared=True
    )
    before = value(stem.kernel)
    toy.compiled(theseus, run_eagerly=True).fit(X, Y, verbose=0)
    assert np.abs(value(stem.kernel) - before).max() > 0
    frozen = Theseus([dense()], [dense()], [dense()], stem=dense(name="s"))
    assert not frozen.stem.trainable
    assert not frozen.head[0].trainable
    frozen.build((None, 3))
    assert all(layer.trainable for layer in frozen.detach().layers)


def test_convolutions():
    old, new = (
        [built(layers.Conv2D(4, 3, padding="same"), 6, 6, 2)] for _ in "ab"
    )
    old.append(built(layers.Conv2D(4, 3, padding="same"), 6, 6, 4))
    head = [layers.GlobalAveragePooling2D(), layers.Dense(2)]
    theseus = Theseus([old], [new], head, mode="sample", seed=0)
    images = np.random.default_rng(0).normal(size=(20, 6, 6, 2))
    x = ops.convert_to_tensor(images.astype("float32"))
    assert theseus(x, training=True).shape == (20, 2)
    module = theseus.replacements[0]
    old_y, new_y = old[1](old[0](x)), new[0](x)
    mixed = value(module(x, training=True))
    is_old, is_new = (
        (mixed == value(y)).all((1, 2, 3)) for y in (old_y, new_y)
    )
    assert (is_old ^ is_new).all()
    assert is_old.any()
    assert is_new.any()


@slow_on_tensorflow
@no_gradient
def test_a_convolutional_net_is_compressed():
    """It learns; the first step's statistics are NumPy's."""

    def block(name, channels=4):
        parts = [
            layers.Conv2D(4, 3, padding="same", name=f"{name}_convolution"),
            layers.BatchNormalization(momentum=0.5, name=f"{name}_norm"),
            layers.ReLU(name=f"{name}_relu"),
        ]
        return built(keras.Sequential(parts, name=name), 4, 4, channels)

    images = np.random.default_rng(0).normal(size=(16, 4, 4, 2))
    images = images.astype("float32")
    labels = np.digitize(images[..., 0].mean((1, 2)), [-0.1, 0.1])
    old = [[block("a", 2), block("b")], [block("c")]]
    new = [block("d", 2), block("e")]
    head = [layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax")]

    def fit(model, epochs):
        return model.fit(
            images, labels, batch_size=16, epochs=epochs, verbose=0
        ).history["loss"]

    frozen = [value(v) for b in sum(old, []) for v in b.variables]

    # All successors in the first step, then as it comes.
    def rate(step):
        return ops.where(step == 0, 1.0, 0.5)

    theseus = Theseus(old, new, head, rate, train_shared=True, seed=0)
    toy.compiled(theseus, keras.optimizers.Adam(0.03))
    kernel = value(new[0].layers[0].kernel).astype("float64")
    window = np.lib.stride_tricks.sliding_window_view
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.einsum(
        "nhwcij,ijco->nhwo", window(padded, (3, 3), axis=(1, 2)), kernel
    )
    first = fit(theseus, 1)
    moving = [value(v) for v in new[0].layers[1].non_trainable_variables]
    expected = sums.mean((0, 1, 2)) / 2, (1 + sums.var((0, 1, 2))) / 2
    np.testing.assert_allclose(moving, expected, rtol=1e-5)
    fit(theseus, 15)
    successor = toy.compiled(theseus.detach(), keras.optimizers.Adam(0.03))
    last = fit(successor, 12)
    assert last[-1] < first[0] / 2
    now = [value(v) for b in sum(old, []) for v in b.variables]
    assert toy.difference(frozen, now) == 0


# Masks and cuts


@keras.saving.register_keras_serializable(package="test_theseus")
class Scaled(layers.Layer):
    """Multiplies each position; the mask is that of the first input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return inputs[0] * inputs[1][..., None]

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask[0]


@keras.saving.register_keras_serializable(package="test_theseus")
class Heeding(layers.Layer):
    """Sums over the past, without what is masked."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.supports_masking = True

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], self.units))

    def call(self, x, mask=None):
        x = ops.tanh(ops.matmul(x, self.kernel))
        if mask is not None:
            x = x * ops.cast(mask, x.dtype)[..., None]
        return ops.cumsum(x, axis=1)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def tagger(blocks=3, prefix=""):
    """Tokens → a class for each, with a mask, a bias and a second input."""
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    scale = keras.Input((5,), name="scale")
    x = layers.Embedding(11, 4, mask_zero=True, name=f"{prefix}embedding")(
        tokens
    )
    bias = layers.Dense(4, name=f"{prefix}bias")(x)
    for i in range(blocks):
        h = Heeding(4, name=f"{prefix}sum_{i}")(x)
        h = Scaled(name=f"{prefix}scaled_{i}")([h, scale])
        x = layers.Add(name=f"{prefix}add_{i}")([x, h, bias])
    x = layers.Dense(3, "softmax", name=f"{prefix}classes")(x)
    return keras.Model({"tokens": tokens, "scale": scale}, x)


TEXT = {
    "tokens": toy.TOKENS[:16],
    "scale": np.abs(toy.DENSE[:16, [0, 1, 2, 0, 1]]),
}
TAGS = np.random.default_rng(1).integers(0, 3, (16, 5))


def cuts(blocks, prefix=""):
    names = ["embedding", *(f"add_{i}" for i in blocks)]
    return [prefix + name for name in names]


def test_cut_model_computes_the_same():
    model = tagger()
    segments = cut_model(model, cuts(range(3)))
    x = {k: ops.convert_to_tensor(v) for k, v in TEXT.items()}
    expected = value(model(x))
    for segment in segments:
        x = segment(x)
    close_in_ulps(value(x), expected)
    names = [[p.name for p in s.parts] for s in segments]
    assert names[0] == ["embedding"]
    assert names[-1] == ["classes"]
    assert "bias" in names[1]
    assert "sum_1" in names[2]


def test_a_sequential_model_is_cut():
    models = [
        keras.Sequential(
            [keras.Input((3,)), dense(name=f"{x}1"), dense(name=f"{x}2")]
        )
        for x in "ab"
    ]
    old, new = (cut_model(m, [m.layers[0]]) for m in models)
    theseus = Theseus(old, new)
    for model in (theseus, theseus.detach()):
        np.testing.assert_allclose(
            model.predict(X, verbose=0), value(models[1](X)), atol=1e-7
        )
    assert old[-1](X).shape == (16, 3)


def test_segments_train_as_the_uncut_model():
    """Where a layer was told how to run, a functional model overrules it."""
    inputs = keras.Input((3,))
    x = layers.Dropout(0.5, seed=1, name="told")(inputs, training=True)
    x = layers.Dropout(0.5, seed=2, name="free")(x)
    model = keras.Model(inputs, x)
    for training in (False, True):
        results = []
        for cut in (False, True):
            for layer in model.layers[1:]:
                generator = layer.seed_generator
                generator.state.assign([layer.seed, 0])
            y = ops.convert_to_tensor(X)
            for part in cut_model(model, "told") if cut else [model]:
                y = part(y, training=training)
            results.append(value(y))
        close_in_ulps(*results)
        assert (results[0] == 0).any() == training


def test_frozen_segments_stay_so():
    segment = cut_model(tagger(), cuts([0]))[1]
    serialize = keras.saving.serialize_keras_object
    for trainable in (True, False):
        segment.trainable = trainable
        copy = keras.saving.deserialize_keras_object(serialize(segment))
        assert copy.trainable == trainable
        assert len(copy.trainable_weights) == 3 * trainable


def test_keep_blocks():
    """Against the layers called by hand; the copy is independent."""
    model = tagger()
    small = keep_blocks(model, [0, 2], cuts(range(3)))
    get = model.get_layer
    x = get("embedding")(TEXT["tokens"])
    bias = get("bias")(x)
    for i in (0, 2):
        h = get(f"sum_{i}")(x) * TEXT["scale"][..., None]
        x = get(f"add_{i}")([x, h, bias])
    expected = value(get("classes")(x))
    mask = TEXT["tokens"] != 0
    np.testing.assert_allclose(
        value(small(TEXT))[mask], expected[mask], atol=1e-6
    )
    small.get_layer("sum_2").set_weights(
        [0 * w for w in small.get_layer("sum_2").get_weights()]
    )
    assert np.abs(get("sum_2").get_weights()[0]).max() > 0
    assert spaced_blocks(12, 3) == [0, 4, 8]
    assert spaced_blocks(12, 5) == [
        0,
        2,
        4,
        7,
        9,
    ]
    with pytest.raises(ValueError, match="Expected numbers of the model's 3"):
        keep_blocks(model, [3], cuts(range(3)))
    with pytest.raises(ValueError, match="left out makes what another"):
        keep_blocks(model, [1, 2], cuts(range(3)))


def theseus_of_taggers(rate, **kwargs):
    old = cut_model(tagger(), cuts([1, 2]))
    new = cut_model(tagger(2, "new_"), cuts([0, 1], "new_"))
    return Theseus(old[:3], new[:3], old[3], rate, seed=0, **kwargs)


@slow_on_tensorflow
@no_gradient
def test_masks_and_side_inputs_cross_the_modules(tmp_path):
    """At rate 1 and 0: the loss of the whole models, masked positions out."""
    keras.utils.set_random_seed(1)
    theseus = theseus_of_taggers(1.0)
    old, new = (
        m[0].cut.model
        for m in (theseus.predecessor_modules, theseus.successor_modules)
    )
    new.get_layer("new_classes").set_weights(
        old.get_layer("classes").get_weights()
    )
    for rate, model in ((1.0, new), (0.0, old)):
        for module in theseus.replacements:
            module.replacement_rate = rate
        losses = []
        for m in (theseus, model):
            m.compile("sgd", "sparse_categorical_crossentropy")
            x = {k: ops.convert_to_tensor(v) for k, v in TEXT.items()}
            y_pred = m(x, training=True)
            losses.append(float(m.compute_loss(x, TAGS, y_pred)))
        np.testing.assert_allclose(*losses, rtol=1e-6)
    # The mask makes the difference.
    free = keras.losses.SparseCategoricalCrossentropy()
    assert abs(float(free(TAGS, value(y_pred))) - losses[0]) > 1e-3
    toy.compiled(theseus).fit(TEXT, TAGS, batch_size=8, verbose=0)
    theseus.save(tmp_path / "theseus.keras")
    loaded = keras.saving.load_model(tmp_path / "theseus.keras")
    expected = theseus.predict(TEXT, verbose=0)
    found = loaded.predict(TEXT, verbose=0)
    close_in_ulps(found, expected)
    found = theseus.detach().predict(TEXT, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_layers_used_in_several_segments(tmp_path):
    """One block called three times is one set of weights, saved as such."""

    def shared(count, name):
        x = inputs = keras.Input((3,), name=f"{name}_input")
        block = layers.Dense(3, "tanh", name=name)
        for _ in range(count):
            x = block(x)
        return keras.Model(inputs, layers.Dense(3, name=f"{name}_head")(x))

    old, new = shared(4, "old"), shared(2, "new")
    theseus = Theseus(
        cut_model(old, "old")[1:4:2],
        cut_model(new, "new")[:2],
        cut_model(old, "old")[4],
    )
    assert len(theseus.trainable_variables) == 2
    np.testing.assert_allclose(
        value(theseus(X)),
        value(old.layers[-1](new.layers[1](new.layers[1](X)))),
        atol=1e-6,
    )
    theseus.save(tmp_path / "theseus.keras")
    loaded = keras.saving.load_model(tmp_path / "theseus.keras")
    assert len(loaded.trainable_variables) == 2
    close_in_ulps(value(loaded(X)), value(theseus(X)))


# Bad input


def test_bad_modules_are_named():
    a, b, c, d = (dense(name=name) for name in "abcd")
    with pytest.raises(ValueError, match="Received: 2 and 1"):
        Theseus([a, b], [c])
    with pytest.raises(ValueError, match=r"Module 1 of the predecessor.*'a'"):
        Theseus([a, a], [c, d])
    with pytest.raises(ValueError, match=r"Module 0 of the successor.*'a'"):
        Theseus([a, b], [[c, a], d])
    with pytest.raises(ValueError, match="'module_1': expected a predecessor"):
        Theseus([a, layers.Dense(3)], [c, d])
    with pytest.raises(ValueError, match=r"Module 0 of the successor.*None"):
        Theseus([a], [None])
    with pytest.raises(ValueError, match=r"Module 0 of the successor.*one lay"):
        Theseus([a, b], [[], c])
    whole = keras.Model(x := keras.Input((3,), name="start"), b(x))
    with pytest.raises(ValueError, match=r"Module 0 of the pred.*'start'"):
        Theseus([whole.layers], [c])
    wrapped = keras.Sequential([keras.Input((3,)), b])
    with pytest.raises(
        ValueError, match=r"Module 1 of the successor.*b/kernel"
    ):
        Theseus([a, b], [c, wrapped])
    with pytest.raises(
        ValueError, match=r"Module 0 of the successor.*The head"
    ):
        Theseus([a], [b], head=b)
    with pytest.raises(ValueError, match=r"weights of its own.*The stem"):
        Theseus([a], [wrapped], stem=b)
    Theseus([a], [wrapped], stem=b, train_shared=True)
    with pytest.raises(ValueError, match=r"Module 0 of the successor.*'d'"):
        ModuleReplacement(d, d)
    with pytest.raises(ValueError, match="a list of predecessor modules"):
        Theseus(a, c)
    with pytest.raises(ValueError, match=r"different names.*'a' twice"):
        Theseus([dense()], [a], head=dense(name="a"))
    wide = layers.Dense(4)
    with pytest.raises(
        ValueError, match=r"'module_0': expected.*\(None, 3\).*\(None, 4\)"
    ):
        Theseus([a], [wide]).build((None, 3))


def test_bad_cuts():
    model = tagger()
    with pytest.raises(ValueError, match="Received: 'nowhere'"):
        cut_model(model, ["nowhere"])
    with pytest.raises(ValueError, match="in the order of the computation"):
        cut_model(model, ["add_1", "add_0"])
    with pytest.raises(ValueError, match="to depend on the one before"):
        cut_model(model, ["sum_0", "bias", "add_1"])
    with pytest.raises(ValueError, match="Found no blocks"):
        cut_model(model)
    x = keras.Input((3,))
    bare = keras.Model(x, layers.Dense(3, name="transformer_layer_0")(x))
    with pytest.raises(ValueError, match=r"before the first block.*layer_0"):
        cut_model(bare)
    assert len(cut_model(bare, ["transformer_layer_0"])) == 1
    with pytest.raises(ValueError, match="Expected a functional model"):
        cut_model(toy.Subclassed())
    segment = cut_model(model, cuts([0]))[1]
    with pytest.raises(ValueError, match=r"takes . tensors.*Received: 1"):
        segment(ops.ones((2, 5, 4)))


@slow_on_tensorflow
@no_gradient
@pytest.mark.parametrize("segments", [True, False])
def test_losses_of_several_outputs_by_name(segments):
    def make(seed):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((3,))
        x = layers.Dense(3, "tanh", name="body")(inputs)
        outputs = [
            layers.Dense(3, "softmax", name="b")(x),
            layers.Dense(1, name="a")(x),
        ]
        return keras.Model(inputs, outputs)

    def compiled(model):
        model.compile(
            keras.optimizers.SGD(0.0),
            {"a": "mse", "b": "sparse_categorical_crossentropy"},
            loss_weights={"a": 3.0, "b": 0.5},
            metrics={"b": "accuracy"},
        )
        return model

    large, small = make(1), make(2)
    if segments:
        old, new = (cut_model(m, ["body"]) for m in (large, small))
        theseus = Theseus(old[:1], new[:1], old[1:], 0.0)
    else:
        theseus = Theseus([large], [small], replacement_rate=0.0)
    targets = {"a": X[:, :1] ** 2, "b": Y}
    expected = compiled(large).evaluate(X, targets, verbose=0, return_dict=True)
    theseus = compiled(theseus)
    # The predecessor runs in training.
    history = theseus.fit(X, targets, verbose=0, batch_size=16).history
    for name in ("loss", "a_loss", "b_loss", "b_accuracy"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5)
