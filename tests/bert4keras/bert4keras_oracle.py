"""Computes with bert4keras what the tests compare between Keras 3 and Keras 2.

The same functions run in two processes: in the tests on Keras 3, through the
bridge, and here as a script on tf_keras, for which bert4keras was written.
They use only names that bert4keras and both versions of Keras have.
"""

import functools
import os
import subprocess
import sys
import tempfile
import textwrap
import zlib

import numpy as np
from bert4keras_cases import (
    CHECKPOINTS,
    CONFIG,
    FULL,
    MODELS,
    QUICK,
    QUICK_LAYERS,
    layer_cases,
    optimizer_cases,
)


def generator(name):
    """Returns random numbers that depend on the name only."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def randomize(model):
    """Gives every weight a value that depends on its layer's name only."""
    for layer in model.layers:
        rng = generator(layer.name)
        layer.set_weights(
            [
                rng.normal(0.02, 0.2, w.shape).astype("float32")
                for w in layer.get_weights()
            ]
        )


def padded_batch(model, lengths=(9, 6, 3)):
    """Returns inputs of several lengths, padded with zeros."""
    rows, columns = len(lengths), max(lengths)
    steps = np.arange(columns)[None]
    valid = steps < np.array(lengths)[:, None]
    batch = []
    for tensor in model.inputs:
        name = tensor.name.split(":")[0]
        rng = generator(name)
        if len(tensor.shape) == 3:
            x = rng.normal(size=(rows, columns, tensor.shape[-1]))
        elif name == "Condition":
            x = rng.normal(size=(rows, tensor.shape[-1]))
        elif "Segment" in name:
            x = valid * (steps >= np.array(lengths)[:, None] // 2)
        elif "Position" in name:
            x = valid * (steps[:, ::-1] * 2)
        else:
            x = valid * rng.integers(1, 50, (rows, columns))
        batch.append(x.astype("float32"))
    return batch


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def outputs_and_gradients(model, name):
    """Returns the outputs and the gradient of each weight on a padded batch."""
    import tensorflow as tf

    result = {}
    inputs = [tf.constant(x) for x in padded_batch(model)]
    inputs = inputs if len(inputs) > 1 else inputs[0]
    with tf.GradientTape() as tape:
        outputs = as_list(model(inputs, training=False))
        loss = 0.0
        for i, y in enumerate(outputs):
            weights = generator(f"output {i}").normal(size=y.shape)
            finite = tf.where(tf.math.is_finite(y), y, 0.0)
            loss += tf.reduce_sum(finite * tf.constant(weights, y.dtype))
            result[f"{name}/output/{i}"] = y.numpy()
    weights = {
        f"{name}/gradient/{layer.name}/{i}": weight
        for layer in model.layers
        for i, weight in enumerate(layer.trainable_weights)
    }
    for key, gradient in tape.gradient(loss, weights).items():
        if gradient is not None:
            result[key] = tf.convert_to_tensor(gradient).numpy()
    return result


def build(name, **kwargs):
    """Builds the model of a case, with its weights set."""
    from bert4keras.backend import keras
    from bert4keras.models import build_transformer_model

    arguments = {"model": name.split(" ")[0], **MODELS[name], **kwargs}
    if "condition" in arguments:
        shape = (arguments.pop("condition"),)
        condition = keras.layers.Input(shape=shape, name="Condition")
        arguments["layer_norm_cond"] = condition
        arguments["additional_input_layers"] = condition
    model = build_transformer_model(**{**CONFIG, **arguments})
    randomize(getattr(model, "model", model))
    return model


@functools.cache
def built(name):
    """Returns the model of a case, for tests that do not change it."""
    return build(name)


def run_model(name, checkpoint=False, **kwargs):
    """Runs the model of a case, and again with the values of a checkpoint."""
    transformer = build(name, return_keras_model=False, **kwargs)
    result = outputs_and_gradients(transformer.model, name)
    if checkpoint:
        result.update(run_checkpoint(transformer, name))
    return result


def checkpoint_values(transformer):
    """Returns a value for each variable of a TensorFlow checkpoint."""
    values = {}
    for layer, names in transformer.variable_mapping().items():
        layer = transformer.layers.get(transformer.prefixed(layer))
        weights = getattr(layer, "trainable_weights", [])
        for name, w in zip(names, weights, strict=False):
            shape = np.zeros(tuple(w.shape), "float32")
            shape = transformer.create_variable(name, shape)[1].shape
            kept = transformer.keep_tokens or transformer.compound_tokens
            if kept and shape[0] == transformer.vocab_size:
                shape = (CONFIG["vocab_size"], *shape[1:])
            value = generator(name).normal(0.02, 0.2, shape)
            values[name] = value.astype("float32")
    return values


def run_checkpoint(transformer, name):
    """Reads a TensorFlow checkpoint and computes the outputs."""
    import tensorflow as tf

    values = checkpoint_values(transformer)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.ckpt")
        tf.raw_ops.SaveV2(
            prefix=path,
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=list(values.values()),
        )
        transformer.load_weights_from_checkpoint(path)
    model = transformer.model
    outputs = as_list(model([*padded_batch(model)], training=False))
    return {f"{name}/checkpoint/{i}": y.numpy() for i, y in enumerate(outputs)}


def run_autoresize():
    """Reads the checkpoint of a narrow model into a wide one."""
    narrow = build("bert", return_keras_model=False)
    wide = build(
        "bert",
        hidden_size=40,
        intermediate_size=112,
        autoresize_weights=True,
        return_keras_model=False,
    )
    wide.load_weights_from_checkpoint(checkpoint_values(narrow))
    return {
        f"autoresize {i}": w for i, w in enumerate(wide.model.get_weights())
    }


def run_layer(name, function):
    """Applies one of `layer_cases` to padded vectors."""
    from bert4keras import layers
    from bert4keras.backend import keras

    tokens = keras.layers.Input((None,), name="Input-Token")
    x = layers.Embedding(60, 12, mask_zero=True, name="Embedding")(tokens)
    model = keras.models.Model(tokens, function(x))
    randomize(model)
    result = outputs_and_gradients(model, name)
    for i, loss in enumerate(model.losses):
        result[f"{name}/loss/{i}"] = loss.numpy()
    return result


def run_functions():
    """Calls the functions of bert4keras.backend, and losses of layers."""
    import tensorflow as tf
    from bert4keras import backend, layers
    from bert4keras.backend import K, keras

    rng = generator("functions")
    x = tf.constant(rng.normal(size=(3, 5, 4)), "float32")
    mask = tf.constant(np.arange(5)[None] < [[5], [3], [1]])
    square = tf.constant(rng.normal(size=(3, 2, 5, 5)), "float32")
    labels = tf.constant(rng.integers(0, 2, (3, 5, 4)), "float32")
    ids = tf.constant(rng.integers(0, 4, (3, 5)), "int32")
    few = tf.constant([[1, 2], [3, 0], [0, 0]])
    soft = tf.nn.softmax(x)
    result = {
        "gelu_erf": backend.gelu_erf(x),
        "gelu_tanh": backend.gelu_tanh(x),
        "swish": backend.swish(x),
        "leaky_relu": backend.leaky_relu(x),
        "root_mean_square": backend.root_mean_square(x, axis=-1),
        "piecewise_linear": [
            backend.piecewise_linear(t, {5: 1.0, 10: 0.1, 12: 0.5})
            for t in range(15)
        ],
        "piecewise_linear from one": [
            backend.piecewise_linear(t, {2: 1.0, 4: 0.0}, from_zero=False)
            for t in range(6)
        ],
        "reshape": backend.reshape(x, (2, -1), 2),
        "flatten": backend.flatten(x, 1),
        "align": backend.align(x, [0, 2, -1], 5),
        "where": backend.where(mask[..., None], x, -1.0),
        "masking": backend.sequence_masking(x, mask, -np.inf),
        "masking axes": backend.sequence_masking(square, mask, 7, [2, 3]),
        "masking bias": backend.sequence_masking(
            square, mask, 0, -1, bias=square > 0
        ),
        "masking float bias": backend.sequence_masking(
            square, mask, 0, -1, bias=2 * square
        ),
        "masking only bias": backend.sequence_masking(
            square, None, -1, bias=square > 0
        ),
        "batch_gather": backend.batch_gather(x[:, 0], few),
        "pool1d": backend.pool1d(x, 2),
        "pool1d average": backend.pool1d(x, 3, 2, "same", pool_mode="avg"),
        "divisible": backend.divisible_temporal_padding(x, 4),
        "sinusoidal": backend.sinusoidal_embeddings(K.arange(5.0), 6),
        "Sinusoidal": backend.Sinusoidal()((7, 4)),
        "rotary": backend.apply_rotary_position_embeddings(
            backend.sinusoidal_embeddings(K.arange(5.0)[None], 4), x, 2 * x
        ),
        "multilabel": backend.multilabel_categorical_crossentropy(labels, x),
        "sparse multilabel": (
            backend.sparse_multilabel_categorical_crossentropy(few, x[:, 0])
        ),
        "sparse multilabel zero": (
            backend.sparse_multilabel_categorical_crossentropy(
                few, x[:, 0], mask_zero=True
            )
        ),
        "crossentropy": K.sparse_categorical_crossentropy(ids, soft),
        "logsumexp": K.logsumexp(x, axis=1),
        "one_hot": K.one_hot(ids, 4),
        "in_train_phase": K.in_train_phase(x, 2 * x, training=0),
    }
    for method in ("softmax", "squared_relu", "softmax_plus"):
        result[method] = backend.attention_normalize(square, mask, -1, method)
    crf = layers.ConditionalRandomField
    memm = layers.MaximumEntropyMarkovModel
    for name, layer in {
        "crf": crf(),
        "crf fast": crf(lr_multiplier=10),
        "memm": memm(lr_multiplier=10),
        "memm low rank": memm(hidden_dim=3, lr_multiplier=2),
    }.items():
        scores = layer(tf.where(mask[..., None], x, -np.inf))
        layer.set_weights(
            [rng.normal(size=w.shape) for w in layer.get_weights()]
        )
        for kind, y in {"sparse": ids, "dense": tf.one_hot(ids, 4)}.items():
            with tf.GradientTape() as tape:
                tape.watch(scores)
                loss = getattr(layer, f"{kind}_loss")(y, scores)
            sources = [scores, *layer.trainable_weights]
            gradients = tape.gradient(loss, sources)
            result[f"{name} {kind} loss"] = loss
            accuracy = getattr(layer, f"{kind}_accuracy")(y, scores)
            result[f"{name} {kind} accuracy"] = accuracy
            for i, g in enumerate(gradients):
                result[f"{name} {kind}/gradient/{i}"] = g
    dense = keras.layers.Dense(2, activation="gelu")
    result["gelu"] = dense.activation(x)
    try:
        backend.set_gelu("tanh")
        result["gelu set"] = keras.layers.Dense(2, "gelu").activation(x)
    finally:
        backend.set_gelu("erf")
    return {
        f"function {name}": np.array(value) for name, value in result.items()
    }


def run_snippets():
    """Decodes, pads and tokenizes."""
    from bert4keras import snippets
    from bert4keras.tokenizers import Tokenizer, load_vocab

    model = build("gpt2_ml", final_activation="linear")

    class Decoder(snippets.AutoRegressiveDecoder):
        @snippets.AutoRegressiveDecoder.wraps(default_rtype="logits")
        def predict(self, inputs, output_ids, states):
            ids = np.concatenate([inputs[0], output_ids], axis=1)
            last = self.last_token(model)
            last.run_eagerly = True  # each length would be traced again
            return 4 * last.predict(ids, verbose=0)

    decoder = Decoder(start_id=None, end_id=7, maxlen=4)
    np.random.seed(3)
    result = {
        "beam": decoder.beam_search([[3, 5, 9]], topk=3),
        "sample": snippets.sequence_padding(
            decoder.random_sample([[3, 5, 9]], n=4, topk=9, topp=0.9)
        ),
    }
    rng = generator("viterbi")
    viterbi = snippets.ViterbiDecoder(
        rng.normal(size=(3, 3)), starts=[0, 2], ends=[1]
    )
    result["viterbi"] = viterbi.decode(rng.normal(size=(6, 3)))
    rows = [np.ones((2, 3)), np.ones((4, 2))]
    result["padding"] = snippets.sequence_padding(rows, seq_dims=2, mode="pre")
    result["resize"] = snippets.orthogonally_resize(
        rng.normal(size=(4, 2)), (6, 4)
    )
    result["substring"] = snippets.longest_common_substring("abcd", "xbcd")[1]
    words = "[PAD] [UNK] [CLS] [SEP] a ab ##c ##d 中 国 hello ##s , .".split()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(words))
        simplified, kept = load_vocab(
            path, simplified=True, startswith=words[:4]
        )
        for cased in (False, True):
            tokenizer = Tokenizer(path, do_lower_case=not cased)
            text = ("Hellos, ABCD中国.", "abc 国")
            ids, segments = tokenizer.encode(*text, maxlen=12)
            result[f"ids {cased}"], result[f"segments {cased}"] = ids, segments
            result[f"text {cased}"] = tokenizer.decode(ids)
            tokens = tokenizer.tokenize(text[0])
            spans = tokenizer.rematch(text[0], tokens)
            result[f"rematch {cased}"] = [i for span in spans for i in span]
    result["kept"], result["simplified"] = kept, sorted(simplified)
    return {f"snippet {k}": np.array(v) for k, v in result.items()}


def run_optimizer(name, optimizer, steps=7):
    """Trains an embedding and a dense layer; returns all steps' weights."""
    import tensorflow as tf
    from bert4keras.backend import keras

    tokens = keras.layers.Input((None,), name="Input-Token")
    x = keras.layers.Embedding(6, 4, name="Embedding")(tokens)
    y = keras.layers.Dense(2, activation="tanh", name="Dense")(x)
    model = keras.models.Model(tokens, y)
    randomize(model)
    rng = generator("data")
    weights, trajectory = model.trainable_weights, []
    for _ in range(steps):
        batch = tf.constant(rng.integers(0, 4, (3, 3)))
        target = tf.constant(rng.normal(size=(3, 3, 2)), "float32")
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(batch) - target))
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        trajectory.append([w.numpy().ravel() for w in weights])
    if hasattr(optimizer, "apply_ema_weights"):
        optimizer.apply_ema_weights()
        trajectory.append([w.numpy().ravel() for w in weights])
        optimizer.reset_old_weights()
        trajectory.append([w.numpy().ravel() for w in weights])
    rows = [np.concatenate(row) for row in trajectory]
    return {f"optimizer {name}": np.array(rows)}


def run_habits():
    """How old scripts use layers and models, apart from bert4keras."""
    from bert4keras import layers
    from bert4keras.backend import K, keras

    rng = generator("habits")
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 1))
    ids = rng.integers(1, 6, (4, 3))
    result = {}

    class WithMetric(layers.Loss):
        def compute_loss(self, inputs, mask=None):
            loss = K.mean(K.square(inputs[0] - inputs[1]))
            self.add_metric(3 * loss, name="m", aggregation="mean")
            return loss

    class Variable(keras.layers.Layer):
        def build(self, input_shape):
            self.w = K.variable(np.ones((3, 1)), name="w")
            self._trainable_weights = [self.w]
            super().build(input_shape)

        def call(self, inputs):
            return K.dot(inputs, self.w)

        def compute_output_shape(self, input_shape):
            return (*input_shape[:-1], 1)

    class SomeRows(layers.Embedding):
        def call(self, inputs, mode="embedding"):
            table = self.embeddings
            mask = np.zeros((K.int_shape(table)[0], 1))
            mask[1:3] += 1
            fixed = K.stop_gradient(table)
            self.embeddings = table * mask + fixed * (1 - mask)
            outputs = super().call(inputs, mode)
            self.embeddings = table
            return outputs

    def fit(name, model, *data):
        randomize(model)
        history = model.fit(*data, epochs=3, verbose=0, batch_size=4).history
        result.update({f"{name} {k}": v for k, v in history.items()})
        for i, w in enumerate(model.get_weights()):
            result[f"{name} weight {i}"] = w

    Input, Dense, Model = keras.layers.Input, keras.layers.Dense, keras.Model
    a, b = Input((3,)), Input((1,))
    model = Model(
        [a, b], WithMetric(0, name="loss")([Dense(1, name="one")(a), b])
    )
    model.compile("sgd")
    fit("layer", model, [x, y])

    a = Input((3,))
    model = Model(a, Variable(name="variable")(a))
    model.compile("sgd", "mse")
    fit("variable", model, x, y)

    a = Input((3,))
    pooled = keras.layers.GlobalAveragePooling1D()(SomeRows(6, 2)(a))
    model = Model(a, Dense(1, name="last")(pooled))
    model.compile("sgd", "mse")
    fit("rows", model, ids, y)

    a = Input((3,))
    h = Dense(2, name="first")(a)
    model = Model(a, Dense(1, name="last")(h))
    model.add_loss(K.mean(K.square(h)))
    model.add_metric(K.mean(K.abs(h)), name="size", aggregation="mean")
    model.compile("sgd", "mse")
    fit("added", model, x, y)
    return {f"habit {k}": np.array(v) for k, v in result.items()}


def weights_file():
    """The bytes of a file of weights that this Keras writes."""
    model = build("albert")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "best_model.h5")
        model.save_weights(path)
        with open(path, "rb") as file:
            return np.frombuffer(file.read(), np.uint8)


def run_python(code, **environment):
    """Runs a script in a new process; returns what it prints.

    It imports what this process can import.
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert not result.returncode, result.stderr[-2000:]
    return result.stdout


@functools.cache
def reference(full=False):
    """Returns the results of tf_keras, computed once in another process."""
    environment = {
        **os.environ,
        "TF_KERAS": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "reference.npz")
        command = [sys.executable, __file__, path, *["full"][: int(full)]]
        subprocess.run(command, env=environment, check=True)
        with np.load(path) as file:
            return dict(file)


def main(path, full=False):
    import tensorflow as tf

    # The optimizers that bert4keras was written for.
    tf.keras.optimizers.Optimizer = tf.keras.optimizers.legacy.Optimizer
    results = {}
    for name in MODELS if full else QUICK:
        options = FULL if full else {}
        checkpoint = full or name in CHECKPOINTS
        results.update(run_model(name, checkpoint, **options))
    for name, function in layer_cases().items():
        if full or name in QUICK_LAYERS:
            results.update(run_layer(name, function))
    if full:
        results.update(run_autoresize())
    results.update(run_functions())
    results.update(run_snippets())
    results.update(run_habits())
    results["weights file"] = weights_file()
    for name, optimizer in optimizer_cases().items():
        results.update(run_optimizer(name, optimizer))
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
