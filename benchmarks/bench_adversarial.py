"""Every adversarial method against plain steps and its peers (also post 8496).

    make bench-adversarial

A bert4keras classifier, trained step by step in turn by every contender. The
peers are

- the recipe of the blog (post 7234) re-expressed for tf_keras in graph mode,
  which runs the same bert4keras: the gradient of the embedding comes out as an
  array, the perturbation is added to the weights, the step is made, and the
  perturbation is taken away again;
- bert4torch's FGM on its own BERT of the same size, on PyTorch, in a virtual
  environment of its own (`--torch-python`). Its step follows the sum of the
  clean and the adversarial gradient: two whole passes.

`--group` runs one of the groups and rewrites its section of the page. FLOPs
are XLA's own count, on the JAX backend, for a Keras transformer of that size.
"""

import functools
import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import tempfile

import numpy as np
from harness import command_line, page
from harness.bert import SIZES, batch, bert, labels
from harness.contest import JAX, LEGACY, ask, compete, serve

PAGE = page.ROOT / "docs/benchmarks/adversarial.md"

# name: label. The first word of a name is the method.
CONTENDERS = {
    "plain": "plain, XLA",
    "fgm": "FGM, matrix, XLA",
    "plain-graph": "plain, no XLA",
    "fgm-graph": "FGM, matrix, no XLA",
    "plain-legacy": "plain, tf_keras",
    "fgm-legacy": "the blog's FGM recipe, tf_keras",
    "plain-torch": "plain, bert4torch",
    "fgm-torch": "FGM, bert4torch (clean + adversarial)",
    "fgm-output": "FGM, output",
    "fgsm": "FGSM, matrix",
    "pgd": "PGD, 3 steps, matrix",
    "freelb": "FreeLB, 3 steps",
    "penalty": "gradient penalty, squared",
    "penalty-norm": "gradient penalty, norm",
    "vat": "VAT, 1 iteration",
    "noise": "VAT, 0 iterations (random noise)",
    "stability": "noise stability",
    "trades": "TRADES, 3 steps",
    "smart": "SMART, 1 step",
    "rdrop": "R-Drop",
    "awp": "adversarial weight perturbation",
    "plain-mixed": "plain, XLA, lengths 32-128 in buckets",
    "fgm-mixed": "FGM, XLA, lengths 32-128 in buckets",
    "plain-mixed-legacy": "plain, tf_keras, the same batches",
}
# title: rows of contenders; memory bounds how many run at the same time.
GROUPS = {
    "peers": (
        "FGM, and tf_keras",
        ["plain fgm plain-graph fgm-graph plain-legacy fgm-legacy".split()],
    ),
    "torch": ("bert4torch", ["plain fgm plain-torch fgm-torch".split()]),
    "methods": (
        "The cost of each method, under XLA",
        [
            "plain fgm fgm-output fgsm penalty penalty-norm".split(),
            "plain pgd freelb vat noise stability".split(),
            "plain trades smart rdrop awp".split(),
        ],
    ),
    "mixed": (
        "Mixed lengths",
        ["plain-mixed fgm-mixed plain-mixed-legacy".split()],
    ),
}
# group: (label, contender, base, target)
RATIOS = {
    "peers": [
        ("FGM / plain, XLA", "fgm", "plain", "<= 1.70"),
        ("FGM / plain, no XLA", "fgm-graph", "plain-graph", ""),
        ("blog's recipe / plain, tf_keras", "fgm-legacy", "plain-legacy", ""),
        ("blog's recipe / FGM, XLA", "fgm-legacy", "fgm", ">= 1.30"),
        ("plain, tf_keras / XLA", "plain-legacy", "plain", ">= 1.50"),
    ],
    "torch": [
        ("bert4torch: FGM / plain", "fgm-torch", "plain-torch", ""),
        ("plain, bert4torch / XLA", "plain-torch", "plain", ""),
        ("FGM, bert4torch / XLA", "fgm-torch", "fgm", ""),
    ],
    "mixed": [
        ("FGM / plain, XLA", "fgm-mixed", "plain-mixed", ""),
        ("plain, tf_keras / XLA", "plain-mixed-legacy", "plain-mixed", ""),
    ],
}
COUNTED = [name for row in GROUPS["methods"][1] for name in row[1:]]
# The model whose operations are counted has no dropout, which R-Drop needs.
COUNTED.remove("rdrop")


def batches(name, options):
    """Endless batches; of four bucketed lengths for the mixed contenders."""
    lengths = [32, 64, 96, 128] if "mixed" in name else [options.length]
    y = labels(options)
    made = [(batch(options, length), y) for length in lengths]
    while True:
        yield from made


def classifier(keras, options):
    body = bert(options)
    pooled = keras.layers.GlobalAveragePooling1D()(body.output)
    outputs = keras.layers.Dense(2, activation="softmax")(pooled)
    return keras.models.Model(body.inputs, outputs)


def method(name):
    """The adversarial method of a contender, or None."""
    import blogkeras as b

    return {
        "plain": lambda: None,
        "fgm": lambda: b.FGM(0.5),
        "fgm-output": lambda: b.FGM(0.5, site="output"),
        "fgsm": lambda: b.FGSM(0.003),
        "pgd": lambda: b.PGD(0.5, steps=3),
        "freelb": lambda: b.FreeLB(0.5, steps=3),
        "penalty": lambda: b.GradientPenalty(1.0),
        "penalty-norm": lambda: b.GradientPenalty(1.0, "norm"),
        "vat": lambda: b.VirtualAdversarialTraining(1.0),
        "noise": lambda: b.VirtualAdversarialTraining(1.0, iters=0),
        "stability": lambda: b.NoiseStability(1.0),
        "trades": lambda: b.TRADES(1.0),
        "smart": lambda: b.SMART(1.0),
        "rdrop": lambda: b.RDrop(1.0),
        "awp": lambda: b.AdversarialWeightPerturbation(),
    }[name.removesuffix("-graph").removesuffix("-mixed")]()


def keras_3(name, options):
    import keras

    import blogkeras
    import blogkeras.bert4keras

    model = classifier(keras, options)
    model.compile(
        keras.optimizers.Adam(2e-5),
        "sparse_categorical_crossentropy",
        jit_compile="graph" not in name,
    )
    if method(name):
        blogkeras.adversarial_training(model, method=method(name))
    return stepper(model.train_on_batch, name, options)


def tf_keras(name, options):
    import tensorflow as tf
    from bert4keras.backend import keras

    model = classifier(keras, options)
    optimizer = keras.optimizers.Adam(2e-5)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    if name != "fgm-legacy":
        return stepper(model.train_on_batch, name, options)
    table = model.get_layer("Embedding-Token").embeddings
    loss = keras.losses.SparseCategoricalCrossentropy()

    @tf.function
    def slope(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        return tf.convert_to_tensor(tape.gradient(value, table))

    def step(x, y):
        g = slope(x, y).numpy()
        delta = 0.5 * g / (np.sqrt((g**2).sum()) + 1e-8)
        table.assign(table.numpy() + delta)
        model.train_on_batch(x, y)
        table.assign(table.numpy() - delta)

    return stepper(step, name, options)


def stepper(train, name, options):
    """One timed step: a batch, or one batch of every length."""
    stream = batches(name, options)
    count = 4 if "mixed" in name else 1

    def step():
        for _ in range(count):
            train(*next(stream))

    step()
    return step


def torch(name, options):
    """bert4torch's BERT; FGM by its own callback's class."""
    import torch

    try:
        import torchvision  # noqa: F401
    except ImportError:  # needed by its video models alone
        part = ""
        for word in ("torchvision", "transforms", "v2", "functional"):
            part = f"{part}.{word}".strip(".")
            spec = importlib.machinery.ModuleSpec(part, None)
            sys.modules[part] = importlib.util.module_from_spec(spec)
    from bert4torch.callbacks import FGM
    from bert4torch.models import build_transformer_model

    config = {
        "model": "bert",
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(options.hidden // 32, 1),
        "intermediate_size": 4 * options.hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "bert4torch_config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        bert = build_transformer_model(config_path=str(path))
    head = torch.nn.Linear(options.hidden, 2)
    model = torch.nn.ModuleDict({"bert": bert, "head": head}).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-5)
    entropy, attack = torch.nn.CrossEntropyLoss(), FGM(model)

    def backward(x, y):
        mask = (x[0] > 0)[..., None]
        h = (model["bert"](x) * mask).sum(1) / mask.sum(1)
        entropy(model["head"](h), y).backward()

    def step(x, y):
        x, y = [torch.from_numpy(a).long() for a in x], torch.from_numpy(y)
        optimizer.zero_grad()
        backward(x, y)
        if "fgm" in name:
            attack.attack(0.5, "word_embeddings")
            backward(x, y)
            attack.restore("word_embeddings")
        optimizer.step()

    return stepper(step, name, options)


def count_flops(options):
    """Prints XLA's operations per step of every method, as JSON."""
    import jax
    import keras
    from keras import layers

    from blogkeras import adversarial_training, training

    tokens = keras.Input((options.length,), dtype="int32")
    h = layers.Embedding(options.vocabulary, options.hidden)(tokens)
    heads = max(options.hidden // 32, 1)
    for _ in range(options.layers):
        a = layers.MultiHeadAttention(heads, options.hidden // heads)(h, h)
        h = layers.LayerNormalization()(layers.Add()([h, a]))
        f = layers.Dense(4 * options.hidden, "gelu")(h)
        f = layers.Dense(options.hidden)(f)
        h = layers.LayerNormalization()(layers.Add()([h, f]))
    h = layers.GlobalAveragePooling1D()(h)
    model = keras.Model(tokens, layers.Dense(2, activation="softmax")(h))
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    x = np.zeros((options.batch, options.length), "int32")
    y = np.zeros((options.batch,), "int32")
    model.train_on_batch(x[:1], y[:1])  # builds everything
    counts = {}
    for name in ["plain", *COUNTED]:
        step = model.train_step
        if method(name):
            adversarial_training(model, method=method(name))
            hook = training.installed(model)
            step = functools.partial(training.make_step(hook), model)
        # A method may add metrics.
        state = model._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        program = jax.jit(step).lower(state, (x, y)).compile()
        counts[name] = program.cost_analysis()["flops"]
    print(json.dumps(counts))


def flops():
    """XLA's operations per step of every method, from a process on JAX."""
    # The count does not depend on how well the code is compiled.
    flags = (
        "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    arguments = [*sys.argv[1:], "--count-flops"]
    return ask(__file__, *arguments, environment={**JAX, "XLA_FLAGS": flags})


def section(group, options):
    """The group's part of the page: its clocks and its ratios."""
    machine = page.environment(
        ["keras", "tensorflow", "tf_keras", "bert4keras", "numpy"]
    )
    if group == "torch":
        peers = page.versions(options.torch_python, ["bert4torch", "torch"])
        machine += f"; peer: {peers}"
    clocks, ratios = [], []
    counts = flops() if group == "methods" else {}
    operations = {n: f"{c / counts['plain']:.2f}" for n, c in counts.items()}
    for row in GROUPS[group][1]:
        names = [name for name in row if name in options.only]
        seconds = compete(
            __file__,
            names,
            rounds=options.rounds,
            environment={n: LEGACY for n in names if "legacy" in n},
            python={n: options.torch_python for n in names if "torch" in n},
        )
        rows = RATIOS.get(group) or [
            (CONTENDERS[n], n, "plain", operations.get(n, "")) for n in row[1:]
        ]
        last = "FLOPs / plain" if counts else "target"
        # Of a second row the base and the titles stand there already.
        new = {k: v for k, v in seconds.items() if not clocks or k != "plain"}
        count = 4 if group == "mixed" else 1
        clocks += page.times(new, CONTENDERS, count)[2 * bool(clocks) :]
        ratios += page.ratios(seconds, rows, last)[2 * bool(ratios) :]
    return [machine, "", *clocks, "", *ratios]


def main():
    parser = command_line.benchmark(__doc__, CONTENDERS, PAGE, **SIZES)
    parser.add_argument("--count-flops", action="store_true")
    parser.add_argument(
        "--group", nargs="*", choices=GROUPS, default=list(GROUPS)
    )
    parser.add_argument("--torch-python", help="a Python that has bert4torch")
    options = parser.parse_args()
    if options.count_flops:
        return count_flops(options)
    if name := options.worker:
        makers = {"legacy": tf_keras, "torch": torch}
        make = next((f for word, f in makers.items() if word in name), keras_3)
        return serve(lambda: make(name, options))
    head = [
        "# Benchmark: adversarial training (posts 7234, 7466, 8496)",
        "",
        f"bert4keras BERT, {options.layers} layers × {options.hidden}, "
        f"vocabulary {options.vocabulary}, batch {options.batch} × "
        f"{options.length}, Adam, dropout 0.1; interleaved steps after "
        f"warm-up, {options.rounds} rounds. Ratios are medians of the ratios "
        "within a round.",
        "",
        "Regenerate: `make bench-adversarial`.",
    ]
    for group in options.group:
        if group == "torch" and not options.torch_python:
            print("no --torch-python: bert4torch is left out")
            continue
        sections = {GROUPS[group][0]: section(group, options)}
        page.update(options.page, head, sections)


if __name__ == "__main__":
    main()
