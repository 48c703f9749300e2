"""Arguments of adversarial training, of BERT-of-Theseus and of reports."""

import toy
from keras import layers
from wrong_values import (
    FREE,
    INF,
    NAN,
    Kind,
    X,
    boolean,
    choice,
    integer,
    layer,
    number,
    row,
    seed,
    sequential,
    stack,
    texts,
    verbose,
)

import blogkeras

EPSILON = number(minimum=0)
SITE = choice()
SCOPE = choice()
STEP = integer(0)
BOUNDS = Kind((1, 0), (0, 0), (0, 1, 2), 3, "01", True, (NAN, 1), none=True)

row(
    blogkeras.FGM,
    {},
    {
        "epsilon": EPSILON,
        "norm_scope": SCOPE,
        "site": SITE,
        "clean_weight": number(0, maximum=1),
        "start_step": STEP,
        "bounds": BOUNDS,
    },
)
row(
    blogkeras.FGSM,
    {},
    {
        "epsilon": EPSILON,
        "site": SITE,
        "clean_weight": number(0, maximum=1),
        "start_step": STEP,
        "bounds": BOUNDS,
    },
)
row(
    blogkeras.PGD,
    {},
    {
        "epsilon": EPSILON,
        "steps": integer(1),
        "step_size": number(0, none=True),
        "random_start": boolean(),
        "norm_scope": SCOPE,
        "site": SITE,
        "seed": seed(),
        "kwargs": FREE,
    },
)
row(
    blogkeras.FreeLB,
    {},
    {
        "epsilon": EPSILON,
        "steps": integer(1),
        "step_size": number(0),
        "initial_norm": number(0),
        "norm_scope": SCOPE,
        "site": SITE,
        "seed": seed(),
        "kwargs": FREE,
    },
)
row(
    blogkeras.GradientPenalty,
    {},
    {"epsilon": EPSILON, "form": choice(), "site": SITE, "start_step": STEP},
)
row(
    blogkeras.NoiseStability,
    {},
    {
        "epsilon": EPSILON,
        "from_logits": Kind("True", 1, 0.5, none=True),
        "output_kind": choice(none=True),
        "seed": seed(),
        "start_step": STEP,
    },
)
row(
    blogkeras.VirtualAdversarialTraining,
    {},
    {
        "epsilon": EPSILON,
        "xi": number(above=0),
        "iters": integer(0),
        "norm_scope": SCOPE,
        "from_logits": Kind("True", 1, 0.5, none=True),
        "output_kind": choice(none=True),
        "seed": seed(),
        "start_step": STEP,
    },
)
for method in (blogkeras.TRADES, blogkeras.SMART):
    row(
        method,
        {},
        {
            "epsilon": EPSILON,
            "weight": number(0),
            "steps": integer(1),
            "step_size": number(0, none=True),
            "initial_norm": number(above=0, maximum=1),
            "norm_scope": SCOPE,
            "bounds": BOUNDS,
            "from_logits": Kind("True", 1, 0.5, none=True),
            "seed": seed(),
            "start_step": STEP,
            "output_kind": choice(none=True),
        },
    )
row(
    blogkeras.RDrop,
    {},
    {
        "epsilon": EPSILON,
        "from_logits": Kind("True", 1, 0.5, none=True),
        "start_step": STEP,
        "output_kind": choice(none=True),
    },
)
row(
    blogkeras.AdversarialWeightPerturbation,
    {},
    {
        "epsilon": EPSILON,
        "attack": Kind(
            3,
            True,
            "fgm",
            blogkeras.FGM,
            blogkeras.FreeLB(),
            blogkeras.GradientPenalty(),
            blogkeras.FGM(clean_weight=0.5),
            none=True,
        ),
        "start_step": STEP,
    },
)
row(
    blogkeras.adversarial_training,
    {"model": texts},
    {
        "model": layer(),
        "padding_mask": Kind(3, True, "missing", none=True),
        "embedding_name": Kind(3, True, 1.5, [], ["a", "a"], none=True),
        "epsilon": number(0, none=True),
        "method": Kind("bogus", 3, True, blogkeras.FGM),
        "joint_norm": boolean(),
    },
)
row(
    blogkeras.adversarial_loss,
    {"model": texts, "loss": "sparse_categorical_crossentropy"},
    {
        "model": layer(),
        "loss": Kind(3, True, ["mse"], "msee", none=True),
        "padding_mask": Kind(3, True, "missing", none=True),
        "embedding_name": Kind(3, True, 1.5, [], ["a", "a"], none=True),
        "epsilon": number(0, none=True),
        "method": Kind("bogus", 3, True, blogkeras.FGM),
        "joint_norm": boolean(),
    },
)
row(
    blogkeras.virtual_adversarial_training,
    {"model": texts},
    {
        "model": layer(),
        "padding_mask": Kind(3, True, none=True),
        "from_logits": Kind("True", 1, 0.5, none=True),
        "output_kind": choice(none=True),
        "embedding_name": Kind(3, True, 1.5, none=True),
        "epsilon": EPSILON,
        "xi": number(above=0),
        "iters": integer(0),
    },
)
row(blogkeras.plain_training, {"model": texts}, {"model": layer()})
row(blogkeras.describe_training, {"model": texts}, {"model": layer()})
row(
    blogkeras.evaluate_robustness,
    {
        "model": texts,
        "x": toy.TOKENS[:8],
        "y": toy.LABELS[:8],
        "epsilons": [0.0],
        "verbose": 0,
    },
    {
        "model": layer(),
        "padding_mask": Kind(3, True, "missing", none=True),
        "callbacks": FREE,
        "max_batches": integer(1, none=True),
        "x": FREE,
        "y": FREE,
        "epsilons": Kind("all", [], [-1.0], [NAN], ["a"]),
        "attack": Kind("bogus", 3, True),
        "embedding_name": Kind(3, True, 1.5, none=True),
        "relative": boolean(),
        "steps": integer(1),
        "batch_size": integer(1, none=True),
        "sample_weight": FREE,
        "verbose": verbose(),
        "norm": choice(),
        # Tokens have no range.
        "bounds": Kind(*BOUNDS.wrong[:-1], (0, 1), none=True),
    },
)


def modules(count=2):
    made = [layers.Dense(3, name=f"d{i}") for i in range(count)]
    for one in made:
        one.build((None, 3))
    return made


RATE = Kind("half", True, NAN, INF, -0.1, 1.1, [0.5])
MODULES = Kind("dense", 3, [], ["dense"], [3])
row(
    blogkeras.ModuleReplacement,
    {
        "predecessor": lambda: modules()[0],
        "successor": lambda: modules()[1],
    },
    {
        "predecessor": MODULES,
        "successor": MODULES,
        "replacement_rate": RATE,
        "mode": choice(),
        "predecessor_dropout": boolean(),
        "seed": seed(),
        "kwargs": FREE,
    },
)
row(
    blogkeras.Theseus,
    {"predecessor_modules": modules, "successor_modules": modules},
    {
        "predecessor_modules": MODULES,
        "successor_modules": MODULES,
        "head": Kind("dense", 3, none=True),
        "replacement_rate": RATE,
        "stem": Kind("dense", 3, none=True),
        "mode": choice(),
        "train_shared": boolean(),
        "predecessor_dropout": boolean(),
        "seed": seed(),
        "kwargs": FREE,
    },
)
row(
    blogkeras.Distillation,
    {"teacher": sequential, "student": lambda: sequential.__wrapped__()},
    {
        "teacher": layer(),
        "student": layer(),
        "temperature": number(above=0),
        "weight": number(0, maximum=1),
        "from_logits": Kind("True", 1, 0.5, none=True),
        "output_kind": choice(none=True),
        "hidden": Kind(3, "x", (1, 2), ["x"], [("a", "b")], none=True),
        "hidden_loss": choice(),
        "hidden_weight": number(0),
        "hidden_heads": integer(1),
        "kwargs": FREE,
    },
)
row(
    blogkeras.LinearReplacement,
    {"slope": 0.1},
    {"slope": number(0), "start": number(0, maximum=1)},
)
row(
    blogkeras.CosineReplacement,
    {"steps": 3},
    {"steps": integer(1), "start": number(0, maximum=1)},
)
row(
    blogkeras.cut_model,
    {"model": stack},
    {"model": layer(), "boundaries": FREE},
)
row(
    blogkeras.keep_blocks,
    {"model": stack, "keep": 1},
    {"model": layer(), "keep": Kind("one", 1.5, True, -1), "boundaries": FREE},
)
row(
    blogkeras.spaced_blocks,
    {"blocks": 3, "count": 1},
    {"blocks": integer(1), "count": integer(1, more=[4])},
)
row(
    blogkeras.compare_depths,
    {
        "predecessor": stack,
        "classifier": lambda: [
            layers.GlobalAveragePooling1D(),
            layers.Dense(4, "softmax"),
        ],
        "depths": [1],
        "train": lambda: lambda model: None,
        "x": toy.TOKENS[:8, :5],
        "y": toy.LABELS[:8],
        "loss": "sparse_categorical_crossentropy",
        "rounds": 1,
        "verbose": 0,
    },
    {
        "predecessor": layer(),
        "classifier": FREE,
        "depths": Kind(1, "1", [], [0], [1.5], [True], [1, 1]),
        "train": Kind("fit", 3),
        "x": FREE,
        "y": FREE,
        "loss": FREE,
        "metrics": FREE,
        "methods": Kind("one", ["one"], [], {}, 3),
        "successor": Kind("two", 2, none=True),
        "models": Kind({"another": 1}, none=True),
        "batch_size": integer(1),
        "rounds": integer(1),
        "verbose": verbose(),
    },
)
row(
    blogkeras.compression_report,
    {"models": lambda: {"a": sequential()}, "x": X, "y": toy.LABELS[:8]},
    {
        "models": Kind("text", 3, {}, {"a": "model"}),
        "x": FREE,
        "y": FREE,
        "training_seconds": FREE,
        "training_step": boolean(),
        "batch_size": integer(1),
        "rounds": integer(1),
        "verbose": verbose(),
    },
)
