"""bert4keras's optimizers next to what Keras 3 has of its own.

    python benchmarks/record_bert4keras_optimizers.py

Both descend the same noisy quadratic for 60 steps, with the same arguments as
far as there are any. The table goes into docs/bert4keras.md.
"""

import keras
import numpy as np
from harness import page

import blogkeras.bert4keras  # noqa: F401

# isort: split
from bert4keras import optimizers as o

DOCS = page.ROOT / "docs/bert4keras.md"
STEPS, RATE = 60, 0.01
SAME = {"learning_rate": RATE, "epsilon": 1e-6}
DECAY = {"weight_decay_rate": 0.1}
decay = o.extend_with_weight_decay(o.Adam)
linear = o.extend_with_piecewise_linear_lr(o.Adam)
average = o.extend_with_exponential_moving_average(o.Adam)
accumulate = o.extend_with_gradient_accumulation(o.Adam)
LAMB = o.extend_with_layer_adaptation(o.Adam)
LAMB_DECAY = o.extend_with_layer_adaptation(decay)
k = keras.optimizers

# bert4keras, Keras 3, an optimizer of each, why they differ
PAIRS = [
    (
        "`Adam(lr, epsilon=e)`",
        "`Adam(lr, epsilon=e)`",
        o.Adam(**SAME),
        k.Adam(**SAME),
        "Keras adds epsilon before the bias correction, by default 1e-7 "
        "instead of 1e-6",
    ),
    (
        "`extend_with_weight_decay(Adam)(weight_decay_rate=w)`",
        "`AdamW(weight_decay=w)`",
        decay(**SAME, **DECAY),
        k.AdamW(**SAME, weight_decay=0.1),
        "`exclude_from_weight_decay` is a method there",
    ),
    (
        "`Lion(lr, b1, b2)`",
        "`Lion(lr, b1, b2)`",
        o.Lion(RATE, 0.95, 0.98),
        k.Lion(RATE, 0.95, 0.98),
        "defaults 0.95, 0.98 against 0.9, 0.99",
    ),
    (
        "`extend_with_layer_adaptation(Adam)` (LAMB)",
        "`Lamb`",
        LAMB(**SAME),
        k.Lamb(**SAME),
        "",
    ),
    (
        "the same with weight decay",
        "`Lamb(weight_decay=w)`",
        LAMB_DECAY(**SAME, **DECAY),
        k.Lamb(**SAME, weight_decay=0.1),
        "Keras decays outside of the adapted step",
    ),
    (
        "`AdaFactor(lr, min_dim_size_to_factor=2)`",
        "`Adafactor(lr, relative_step=False)`",
        o.AdaFactor(RATE, min_dim_size_to_factor=2),
        k.Adafactor(RATE, relative_step=False),
        "Keras factorizes every matrix, bert4keras by default those of 128 or "
        "more",
    ),
    (
        "`AdaFactor(None, min_dim_size_to_factor=2)`",
        "`Adafactor(0.01)`",
        o.AdaFactor(None, min_dim_size_to_factor=2),
        k.Adafactor(0.01),
        "relative steps",
    ),
    (
        "`extend_with_piecewise_linear_lr(Adam)(lr, {0: 1, n: 0.1})`",
        "`Adam(PolynomialDecay(lr, n, 0.1 * lr))`",
        linear(**SAME, lr_schedule={0: 1.0, 40: 0.1}),
        k.Adam(k.schedules.PolynomialDecay(RATE, 40, RATE / 10), epsilon=1e-6),
        "more than two points: bert4keras's",
    ),
    (
        "`extend_with_exponential_moving_average(Adam)(ema_momentum=m)`",
        "`Adam(use_ema=True, ema_momentum=m)`",
        average(**SAME, ema_momentum=0.9),
        k.Adam(**SAME, use_ema=True, ema_momentum=0.9),
        "Keras's average starts at the initial weights, bert4keras's at zero "
        "with correction; `finalize_variable_values`",
    ),
    (
        "`extend_with_gradient_accumulation(Adam)(grad_accum_steps=n)`",
        "`Adam(gradient_accumulation_steps=n)`",
        accumulate(**SAME, grad_accum_steps=3),
        k.Adam(**SAME, gradient_accumulation_steps=3),
        "bert4keras's update comes one batch later, and its bias correction "
        "counts batches",
    ),
]


def descend(optimizer):
    """Returns the weights after the last step, and how far they went."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in ((8, 6), (6,))]
    goal = [rng.normal(size=w.shape) for w in start]
    weights = [keras.Variable(w, dtype="float32") for w in start]
    for _ in range(STEPS):
        gradients = [
            keras.ops.convert_to_numpy(w) - g + 0.1 * rng.normal(size=g.shape)
            for w, g in zip(weights, goal, strict=True)
        ]
        gradients = [keras.ops.cast(g, "float32") for g in gradients]
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
    if hasattr(optimizer, "apply_ema_weights"):
        optimizer.apply_ema_weights()
    elif optimizer.use_ema:
        optimizer.finalize_variable_values(weights)
    found = np.concatenate(
        [keras.ops.convert_to_numpy(w).ravel() for w in weights]
    )
    way = found - np.concatenate([w.ravel() for w in start])
    return found, np.abs(way).max()


def difference(ours, theirs):
    """Largest difference of a weight, relative to the longest way of one."""
    (a, way), (b, _) = descend(ours), descend(theirs)
    return float(np.abs(a - b).max() / way)


def main():
    rows = []
    for old, new, ours, theirs, why in PAIRS:
        found = difference(ours, theirs)
        rows.append([old, new, f"{found:.0e}" if found else "0", why])
    columns = ["bert4keras", "Keras 3", "difference", ""]
    page.put(DOCS, "optimizers", page.table(columns, rows))


if __name__ == "__main__":
    main()
