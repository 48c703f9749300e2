"""What holds for models, methods of training, and what changes models."""

import functools
import re

import catalogue
import keras
import numpy as np
import toy
from hypothesis import strategies as st
from keras import layers, ops
from kit import TENSORFLOW
from property_table import holds_for
from strategies import (
    KINDS,
    SEEDS,
    arrays,
    close,
    contents,
    mask_of,
    number,
    refuses,
)

import blogkeras

ROWS = 16
MODELS = {make.__name__: make for make, _, _ in catalogue.MODELS}
# {public class: function of the catalogue that makes one}
MAKERS = {
    type_: name
    for name, type_ in {
        "nvae": "NVAE",
        "density_estimator": "DenoisingDensityEstimator",
        "denoising_autoencoder": "DenoisingAutoencoder",
        "annealed_score_matching": "AnnealedScoreMatching",
        "denoising_generator": "DenoisingGenerator",
        "electra": "ElectraPretrainer",
        "masked_language_model": "MaskedLanguageModel",
        "code_prior": "CodePrior",
        "vqvae": "VQVAE",
        "bottleneck": "HSICBottleneck",
        "theseus": "Theseus",
        "distillation": "Distillation",
    }.items()
    if name in MODELS
}
OF_TOKENS = ("ElectraPretrainer", "MaskedLanguageModel", "CodePrior")
WITH_LABELS = ("HSICBottleneck", "Theseus", "Distillation")
SCALES = st.sampled_from([1.0, 0.0, 1e-3, 3.0])


@functools.cache
def built(name):
    """`(model, its first state)`, compiled once for all cases."""
    model = MODELS[MAKERS[name]]()
    if TENSORFLOW:
        # Compiling takes longer than all the steps.
        model.run_eagerly, model.jit_compile = True, False
    x, y = batch(name, 0, 1.0)
    if hasattr(model, "adapt") and name != "VQVAE":
        model.adapt(x)
    model.train_on_batch(x, y)
    return model, [ops.convert_to_numpy(v) for v in variables(model)]


def variables(model):
    return [*model.variables, *model.optimizer.variables]


def reset(name, scale=1.0):
    """The model as it was, its trainable weights times a number."""
    model, state = built(name)
    trainable = {id(v) for v in model.trainable_variables}
    for variable, value in zip(variables(model), state, strict=True):
        factor = scale if id(variable) in trainable else 1
        variable.assign(value * np.asarray(factor, value.dtype))
    return model


def batch(name, seed, largest=1e3):
    """A batch of rows, each of its own kind."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, ROWS).astype("int32")
    if name in OF_TOKENS:
        x = rng.integers(0, toy.VOCABULARY, (ROWS, 5))
        x[1], x[2], x[3] = 0, 1, rng.integers(0, toy.VOCABULARY)
        return x.astype("int32"), None
    shape = (4, 4, 1) if name == "NVAE" else (3,)
    kinds = rng.permutation(np.array(KINDS))
    x = np.stack([contents(kind, seed, shape, largest) for kind in kinds])
    if name == "NVAE":
        x = np.clip(np.abs(x), 0, 1)
    return x.astype("float32"), y if name in WITH_LABELS else None


@holds_for(
    *(name for name in MAKERS if name != "NVAE"),
    cases=ROWS,
    short=1,
    slow_on_jax=True,
)
def a_step_on_degenerate_rows_stays_finite(cls, seed=SEEDS, scale=SCALES):
    name = cls.__name__
    model = reset(name, scale)
    x, y = batch(name, seed)
    logs = model.train_on_batch(x, y, return_dict=True)
    for value in logs.values():
        number(value)
    for variable in variables(model):
        number(variable)


@holds_for("NVAE", cases=ROWS, short=1, slow_on_jax=True)
def pictures_of_any_kind_have_finite_losses(_, seed=SEEDS, scale=SCALES):
    model = nvae()
    for weight, value in zip(*NVAE_STATE, strict=True):
        weight.assign(value * np.float32(scale))
    x, _ = batch("NVAE", seed)
    output = model(x)
    for tensor in keras.tree.flatten(output):
        number(tensor)


NVAE_STATE = ([], [])


@functools.cache
def nvae():
    model = MODELS["nvae"]()
    model(batch("NVAE", 0)[0])
    NVAE_STATE[0].extend(model.trainable_variables)
    NVAE_STATE[1].extend(map(ops.convert_to_numpy, model.trainable_variables))
    return model


@holds_for("NVAEConfig", short=20)
def configs_are_consistent_or_refused(
    cls,
    size=st.sampled_from([1, 4, 6, 8, 32]),
    groups=st.lists(st.integers(0, 3), max_size=4),
    channels=st.integers(0, 5),
    latents=st.integers(0, 4),
):
    fields = {
        "groups": tuple(groups),
        "channels": channels,
        "latent_channels": latents,
    }
    try:
        config = cls((size, size, 1), **fields)
    except ValueError as error:
        assert re.search(r"(?s)[Ee]xpected.*Received", str(error))  # noqa: PT017
        return
    assert min(groups) >= 1
    assert min(channels, latents) >= 1
    assert config == cls((size, size, 1), **fields)
    assert config.groups == tuple(groups)


@holds_for(
    "Theseus",
    "Distillation",
    "DenoisingDensityEstimator",
    "DenoisingAutoencoder",
    "AnnealedScoreMatching",
    cases=ROWS,
    short=1,
    slow_on_jax=True,
)
def rows_of_weight_0_have_no_influence(cls, seed=SEEDS, other=SEEDS):
    name = cls.__name__
    x, y = batch(name, seed, 1.0)
    weights = mask_of("any", seed, (ROWS,))
    changed, _ = batch(name, other, 1e3)
    states = []
    for rows in (x, np.where(weights[:, None], x, changed)):
        model = reset(name)
        target = rows if y is None else y
        model.train_on_batch(rows, target, weights.astype("float32"))
        states.append([number(v) for v in model.trainable_variables])
    for a, b in zip(*states, strict=True):
        close(a, b, 1e-5, 1 + np.abs(a))
    if not weights.any():
        _, state = built(name)
        first = dict(zip(map(id, variables(model)), state, strict=True))
        for variable in model.trainable_variables:
            close(variable, first[id(variable)], 1e-6)


# Methods of adversarial training


@functools.cache
def texts():
    """A small classifier of tokens, run eagerly: nothing is compiled anew."""
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(toy.VOCABULARY, 3, mask_zero=True, name="embedding")(
        tokens
    )
    h = layers.GlobalAveragePooling1D()(h)
    # R-Drop refuses a model without dropout. This one drops nothing.
    h = layers.Dropout(1e-9)(h)
    outputs = layers.Dense(3, activation="softmax", name="head")(h)
    model = keras.Model(tokens, outputs)
    model.compile(
        keras.optimizers.SGD(0.5),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    return model


def text_batch(seed, largest):
    """Tokens, labels and sample weights; the weights of the model are drawn."""
    rng = np.random.default_rng(seed)
    model = blogkeras.plain_training(texts())
    kind = KINDS[seed % len(KINDS)]
    for k, weight in enumerate(model.weights):
        value = contents(
            kind if k == 0 else "normal", seed + k, weight.shape, largest
        )
        weight.assign(value)
    tokens = rng.integers(1, toy.VOCABULARY, (ROWS, 5))
    # Keras's pooling of a row without a token is 0 / 0.
    lengths = rng.integers(1, 6, (ROWS, 1))
    tokens = np.where(np.arange(5) < lengths, tokens, 0).astype("int32")
    weights = mask_of(["any", "all", "none"][seed % 3], seed, (ROWS,)).astype(
        "float32"
    )
    return model, tokens, rng.integers(0, 3, ROWS).astype("int32"), weights


METHODS = {cls.__name__: options for cls, options in catalogue.METHODS}


def install(name, model, epsilon):
    options = {**METHODS[name], "epsilon": epsilon}
    method = getattr(blogkeras, name)(**options)
    blogkeras.adversarial_training(model, method=method)


def step(model, *data):
    """One training step: the weights after it."""
    number(model.train_on_batch(*data))
    return [number(w) for w in model.weights]


@holds_for(*METHODS, cases=ROWS, short=1, slow_on_jax=True)
def training_with_a_method_stays_finite(cls, seed=SEEDS):
    model, x, y, weights = text_batch(seed, 30.0)
    before = [number(w) for w in model.weights]
    install(cls.__name__, model, 0.5)
    after = step(model, x, y, weights)
    if not weights.any() and cls.__name__ not in LABEL_FREE:
        for a, b in zip(before, after, strict=True):
            close(a, b, 1e-6, 1 + np.abs(a))


LABEL_FREE = (
    "VirtualAdversarialTraining",
    "NoiseStability",
    "TRADES",
    "SMART",
    "RDrop",
)


@holds_for(*METHODS, cases=ROWS, short=1, slow_on_jax=True)
def strength_0_is_plain_training(cls, seed=SEEDS):
    results = []
    for install_method in (False, True):
        model, x, y, weights = text_batch(seed, 3.0)
        if install_method:
            install(cls.__name__, model, 0.0)
        results.append(step(model, x, y, weights))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-5, 1 + np.abs(a))


@holds_for(
    "adversarial_training",
    "virtual_adversarial_training",
    "plain_training",
    cases=ROWS,
    short=1,
    slow_on_jax=True,
)
def the_last_call_wins(function, seed=SEEDS):
    plans = {
        "adversarial_training": lambda m: function(m, "embedding", 0.5),
        "virtual_adversarial_training": lambda m: function(m, "embedding", 0.5),
        "plain_training": function,
    }
    results = []
    for others in ((), METHODS):
        model, x, y, weights = text_batch(seed, 3.0)
        for name in others:
            install(name, model, 0.7)
        toy.reset()
        assert plans[function.__name__](model) is model
        results.append(step(model, x, y, weights))
    if function is blogkeras.virtual_adversarial_training:
        return  # its noise is drawn anew: it is enough that it is finite
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-5, 1 + np.abs(a))


@holds_for("adversarial_loss", cases=ROWS, short=1, slow_on_jax=True)
def the_loss_is_that_of_a_step(function, seed=SEEDS):
    name = sorted(METHODS)[seed % len(METHODS)]
    model, x, y, weights = text_batch(seed, 3.0)
    method = getattr(blogkeras, name)(**METHODS[name])
    fn = function(model, "sparse_categorical_crossentropy", method)
    result = fn(x, y, weights, step=model.optimizer.iterations)
    install(name, model, METHODS[name]["epsilon"])
    logs = model.train_on_batch(x, y, weights, return_dict=True)
    # Dropout of the two draws other masks, and drops nothing.
    close(number(result.loss), logs["loss"], 1e-4, 1 + abs(logs["loss"]))
    blogkeras.plain_training(model)


@holds_for("describe_training", cases=11, short=3)
def the_line_names_the_method_and_the_place(function, seed=SEEDS):
    name = sorted(METHODS)[seed % len(METHODS)]
    model = texts()
    install(name, model, 0.5)
    line = function(model)
    assert line.startswith(f"{name}(epsilon=0.5")
    assert "\n" not in line
    assert ("'embedding'" in line) == (
        name not in ("RDrop", "AdversarialWeightPerturbation")
    )
    # `texts` makes the same model again and again.
    blogkeras.plain_training(model)


@holds_for(
    "evaluate_robustness", "Robustness", cases=ROWS, short=1, slow_on_jax=True
)
def an_attack_does_not_lower_the_loss_at_0(_, seed=SEEDS):
    model, x, y, weights = text_batch(seed, 3.0)
    weights[0] = 1.0
    result = blogkeras.evaluate_robustness(
        model,
        x,
        y,
        epsilons=(0.0, 0.01),
        sample_weight=weights,
        embedding_name="embedding",
        batch_size=ROWS,
        verbose=0,
    )
    clean, attacked = number(result.column("loss"))
    expected = model.evaluate(
        x, y, sample_weight=weights, batch_size=ROWS, verbose=0
    )
    close(clean, expected, 1e-5, 1 + abs(clean))
    assert attacked >= clean - 1e-3 * (1 + abs(clean))
    assert len(result.rows) == 2


# What changes models


@functools.cache
def transformer():
    """Blocks with the names of a transformer's."""
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(toy.VOCABULARY, 4, name="embedding")(tokens)
    for index in range(4):
        h = layers.Dense(4, "tanh", name=f"transformer_layer_{index}")(h)
    return keras.Model(tokens, layers.Dense(2, name="head")(h))


def drawn_transformer(seed):
    """The model with drawn weights, its tokens, and what it computes."""
    model, rng = transformer(), np.random.default_rng(seed)
    for weight in model.weights:
        kind = rng.choice(["normal", "equal rows", "sparse", "zeros"])
        weight.assign(contents(str(kind), seed, weight.shape, 1e3))
    tokens = rng.integers(0, toy.VOCABULARY, (8, 5)).astype("int32")
    return model, tokens, number(model(tokens))


@functools.cache
def segments(count):
    names = [f"transformer_layer_{index}" for index in range(count)]
    return blogkeras.cut_model(transformer(), names)


@holds_for("cut_model", "Segment", cases=8, short=2)
def segments_compute_what_the_model_computes(
    _, seed=SEEDS, count=st.integers(1, 4)
):
    _, x, expected = drawn_transformer(seed)
    parts = segments(count)
    assert len(parts) == count + 1
    for part in parts:
        x = part(x)
    close(x, expected, 1e-6, 1 + np.abs(expected))


@holds_for("keep_blocks", cases=8, short=2)
def kept_blocks_are_applied_in_order(
    function,
    seed=SEEDS,
    keep=st.lists(st.integers(0, 3), min_size=1, max_size=4),
):
    model, x, _ = drawn_transformer(seed)
    smaller = function(model, keep)
    h = model.get_layer("embedding")(x)
    for index in keep:
        h = model.get_layer(f"transformer_layer_{index}")(h)
    expected = number(model.get_layer("head")(h))
    close(smaller(x), expected, 1e-6, 1 + np.abs(expected))
    with refuses():
        function(model, [*keep, 4])


@holds_for("spaced_blocks", short=20)
def numbers_are_spaced_evenly(
    function, blocks=st.integers(1, 10**6), count=st.integers(1, 60)
):
    if count > blocks:
        with refuses():
            function(blocks, count)
        return
    numbers = function(blocks, count)
    assert len(numbers) == count
    assert numbers[0] == 0
    assert numbers[-1] < blocks
    gaps = np.diff([*numbers, blocks])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@holds_for("share_layers", "unshare_layers", cases=8, short=1)
def sharing_and_unsharing_change_nothing_more(
    _,
    seed=SEEDS,
    source=st.sampled_from(["first", "mean"]),
    groups=st.sampled_from([1, 2, 4]),
):
    model, x, _ = drawn_transformer(seed)
    shared = blogkeras.share_layers(model, source, groups)
    expected = number(shared(x))
    unshared = blogkeras.unshare_layers(shared)
    close(unshared(x), expected, 1e-6, 1 + np.abs(expected))
    assert unshared.count_params() == model.count_params()
    size = 4 * 4 + 4
    assert shared.count_params() == model.count_params() - (4 - groups) * size
    if source == "first":
        first = number(model.get_layer("transformer_layer_0").kernel)
        kernels = [number(w) for w in shared.weights if w.shape == (4, 4)]
        np.testing.assert_array_equal(kernels[0], first)


@holds_for("factorize_embedding", cases=8, short=1)
def the_error_is_that_of_the_table(
    function, table=arrays((toy.VOCABULARY, 4), 1e15), size=st.integers(1, 4)
):
    model = transformer()
    model.get_layer("embedding").embeddings.assign(table)
    small, error = function(model, size)
    narrow = number(small.get_layer("embedding").embeddings)
    projection = number(small.get_layer("embedding_projection").kernel)
    assert narrow.shape == (toy.VOCABULARY, size)
    wide = table.astype("float64")
    scale = max(np.linalg.norm(wide), 1e-300)
    actual = np.linalg.norm(wide - narrow @ projection) / scale
    assert 0 <= error <= 1
    close(error, actual, 1e-5)
    # No worse than keeping `size` columns.
    lengths = np.sort(np.linalg.norm(wide, axis=0))[: 4 - size]
    assert error <= np.linalg.norm(lengths) / scale + 1e-9
    close(projection @ projection.T, np.eye(size), 1e-5)


HAS_MULTI_OPTIMIZER = hasattr(keras.optimizers, "MultiOptimizer")


@holds_for(*["layerwise_optimizer"] * HAS_MULTI_OPTIMIZER, cases=8, short=1)
def rates_decay_with_the_depth(
    function,
    decay=st.sampled_from([1.0, 0.8, 0.5, 1e-3]),
    rate=st.sampled_from([1.0, 1e-3]),
    seed=SEEDS,
):
    model = drawn_transformer(seed)[0]
    optimizer = function(model, keras.optimizers.SGD(rate), decay)
    for weight in model.weights:
        weight.assign(ops.zeros(weight.shape))
    trainable = model.trainable_variables
    optimizer.apply([ops.ones(v.shape) for v in trainable], trainable)
    depth = {"embedding": 5, "head": 0}
    depth |= {f"transformer_layer_{index}": 4 - index for index in range(4)}
    for variable in trainable:
        layer = variable.path.split("/")[-2]
        moved = number(variable)
        expected = np.full(moved.shape, -rate * decay ** depth[layer])
        close(moved, expected, 1e-6, rate)


@functools.cache
def theseus_pair():
    predecessor, successor = (
        keras.models.clone_model(transformer()) for _ in range(2)
    )
    parts = [
        keras.Model(m.input, m.layers[-2].output)
        for m in (predecessor, successor)
    ]
    head = layers.Dense(3, activation="softmax", name="classifier")
    model = blogkeras.bert_of_theseus(
        parts[0], blogkeras.keep_blocks(parts[1], 2), head, seed=0
    )
    model(np.zeros((8, 5), "int32"))
    return model, model.detach(copy=True)


@holds_for("bert_of_theseus", cases=8, short=1, slow_on_jax=True)
def the_successor_is_what_is_left(_, seed=SEEDS):
    model, left = theseus_pair()
    rng = np.random.default_rng(seed)
    for weight in left.weights:
        weight.assign(contents("normal", seed, weight.shape))
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(contents("normal", seed, weight.shape))
    tokens = rng.integers(0, toy.VOCABULARY, (8, 5)).astype("int32")
    output = number(model(tokens, training=False))
    close(output.sum(-1), np.ones(output.shape[:-1]), 1e-5)
    close(left(tokens), output, 1e-5)
    # In training each row is a distribution too, of whichever branch.
    mixed = number(model(tokens, training=True))
    close(mixed.sum(-1), np.ones(mixed.shape[:-1]), 1e-5)


@functools.cache
def classifiers():
    return {"large": catalogue.classifier(), "small": catalogue.classifier()}


@holds_for(
    "compression_report",
    "CompressionReport",
    cases=ROWS,
    short=1,
    slow_on_jax=True,
)
def a_report_says_what_evaluate_says(_, seed=SEEDS):
    x, y = batch("Theseus", seed)
    models = classifiers()
    report = blogkeras.compression_report(
        models, x, y, batch_size=ROWS, rounds=1, verbose=0
    )
    assert [row["model"] for row in report.rows] == list(models)
    for row in report.rows:
        loss = models[row["model"]].evaluate(x, y, batch_size=ROWS, verbose=0)
        close(row["loss"], loss, 1e-6, 1 + abs(loss))
        assert row["parameters"] == 12
        for value in row.values():
            assert isinstance(value, str) or number(value) >= 0


@holds_for("compare_depths", cases=8, short=1, slow_on_jax=True)
def untrained_successors_are_the_first_blocks(
    function, seed=SEEDS, depth=st.integers(1, 4)
):
    model, x, _ = drawn_transformer(seed)
    y = np.random.default_rng(seed).random((8, 5, 2)).astype("float32")
    models = {}
    report = function(
        *(model, None, [depth], lambda model: None, x, y),
        loss="mse",
        methods="direct",
        models=models,
        rounds=1,
        verbose=0,
    )
    expected = number(blogkeras.keep_blocks(model, depth)(x))
    close(models[report.rows[1]["model"]](x), expected, 1e-6)
    loss = np.square(expected.astype("float64") - y).mean()
    close(report.rows[1]["loss"], loss, 1e-4, 1 + loss)
    with refuses():
        function(
            *(model, None, [depth, 5], lambda model: None, x, y),
            loss="mse",
            methods="direct",
            verbose=0,
        )


# Texts


@holds_for("token_blocks", short=2)
def every_token_stands_in_one_block(
    function,
    lines=st.lists(st.text("abc ", max_size=9), min_size=1, max_size=6),
    length=st.integers(3, 6),
    join=st.booleans(),
):
    def tokenize(line):
        return [ord(c) - ord("a") + 5 for c in line if c != " "]

    options = {"start_token": 1, "end_token": 2, "join": join, "batch_size": 1}
    texts = [tokenize(line) for line in lines if line.strip()]
    if not texts:
        with refuses():
            function(lines, tokenize, length, **options)
        return
    if join:
        stream = sum([[*text, 2] for text in texts], [])
        step = length - 1
        expected = [stream[i : i + step] for i in range(0, len(stream), step)]
    else:
        step = length - 2
        expected = [
            [*text[i : i + step], 2]
            for text in texts
            for i in range(0, len(text), step)
        ]
    blocks = function(lines, tokenize, length, **options)
    found = [np.asarray(b)[0] for b in blocks.take(len(expected))]
    padded = [[1, *row] + [0] * (length - 1 - len(row)) for row in expected]
    assert sorted(map(tuple, padded)) == sorted(
        tuple(b.tolist()) for b in found
    )
