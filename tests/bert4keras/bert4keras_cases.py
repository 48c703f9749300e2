"""The models, layers and optimizers that `bert4keras_oracle.py` runs."""

CONFIG = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "max_position": 40,
}

# Arguments of build_transformer_model, by the name of the case, of which the
# first word is the name of the model.
MODELS = {
    "bert": {},
    "roberta": {"with_mlm": True},
    "albert": {"embedding_size": 16, "num_hidden_layers": 2},
    "albert_unshared": {"embedding_size": 16, "num_hidden_layers": 2},
    "electra": {"with_discriminator": True},
    "nezha": {},
    "roformer": {"with_mlm": "linear"},
    "roformer_v2": {"with_mlm": True},
    "gpt": {},
    "gpt2": {},
    "gpt2_ml": {},
}
for _version in ("t5", "t5.1.0", "t5.1.1", "mt5.1.1"):
    _act = ["gelu", "linear"] if _version.endswith("1.1") else "relu"
    for _part in ("", "_encoder", "_decoder"):
        MODELS[_version + _part] = {"hidden_act": _act}
for _name in (
    "bert",
    "roberta",
    "albert",
    "albert_unshared",
    "nezha",
    "roformer",
    "roformer_v2",
    "gpt",
):
    for _application in ("lm", "unilm")[_name == "gpt" :]:
        MODELS[f"{_name} {_application}"] = {"application": _application}
MODELS |= {
    "bert pool": {"with_pool": True},
    "bert pool linear": {"with_pool": "linear"},
    "bert nsp mlm": {"with_nsp": True, "with_mlm": True},
    "bert hierarchical": {"hierarchical_position": True, "max_position": 4},
    "bert custom positions": {"custom_position_ids": True},
    "bert keep tokens": {"keep_tokens": list(range(55))},
    "bert compound tokens": {"compound_tokens": [[1, 2], [3, 4]]},
    "bert residual": {
        "residual_attention_scores": True,
        "num_hidden_layers": 2,
    },
    "bert condition": {"condition": 8},
    "bert condition hidden": {
        "condition": 8,
        "layer_norm_cond_hidden_size": 5,
        "layer_norm_cond_hidden_act": "swish",
    },
    "bert prefix": {"prefix": "my-"},
    "bert shared segments": {"shared_segment_embeddings": True},
    "bert no segments": {"segment_vocab_size": 0},
    "bert sizes": {
        "embedding_size": 16,
        "attention_head_size": 12,
        "attention_key_size": 8,
    },
    "bert fixed length": {"sequence_length": 9},
    "bert tanh": {"hidden_act": "gelu_tanh"},
    "roformer custom positions": {"custom_position_ids": True},
    "gpt2 condition": {"condition": 8},
    "t5_encoder condition": {"condition": 8},
    "t5_decoder condition": {"condition": 8, "with_lm": "linear"},
    "t5.1.1_decoder hidden": {
        "with_lm": False,
        "cross_position_bias": False,
        "hidden_act": ["gelu", "linear"],
    },
    "t5.1.1_decoder embedding": {
        "embedding_size": 16,
        "hidden_act": ["gelu", "linear"],
    },
}
# Cases of `make test`; `make verify` runs all cases, and all layers of these.
QUICK = [
    "bert nsp mlm",
    "albert",
    "electra",
    "nezha",
    "roformer_v2 unilm",
    "t5.1.1",
    "bert residual",
    "bert condition hidden",
    "roformer custom positions",
]
CHECKPOINTS = QUICK[:3]
FULL = {"num_hidden_layers": 2}
QUICK_LAYERS = [
    f"layer {name}"
    for name in (
        "average pooling",
        "max pooling",
        "scale condition",
        "norm",
        "norm condition",
        "concatenate",
        "split",
        "attention",
        "attention sizes",
        "attention bool bias",
        "attention relative",
        "attention t5 causal",
        "gau",
        "gau rotary",
        "gau bias",
        "position",
        "position hierarchical",
        "sinusoidal",
        "sinusoidal custom",
        "feed forward gated",
        "crf",
        "memm",
        "pointer",
        "efficient pointer",
        "loss",
    )
]


def layer_cases():
    """Returns functions from masked vectors to outputs, by the case's name."""
    from bert4keras import layers
    from bert4keras.backend import K, keras

    heads = {"heads": 2, "head_size": 6}

    def times(x, kernel):  # (batch, length, length) from (batch, length, dim)
        return keras.layers.Lambda(
            lambda x: K.batch_dot(x, x, axes=[2, 2]) * kernel, name="scores"
        )(x)

    def attention(*extra, inputs=None, **kwargs):
        arguments = kwargs.pop("arguments", {})
        layer = layers.MultiHeadAttention(**{**heads, **kwargs}, name="layer")
        return lambda x: layer([x, x, x, *[f(x) for f in extra]], **arguments)

    def gau(**kwargs):
        return layers.GatedAttentionUnit(10, 6, name="layer", **kwargs)

    def sinusoidal(x, dim=6):
        return layers.SinusoidalPositionEmbedding(dim, "zero", name="pos")(x)

    def condition(x):
        return layers.GlobalAveragePooling1D(name="condition")(x)

    def shorter(x):
        return keras.layers.Lambda(lambda x: x[:, 1:], name="shorter")(x)

    pooled = layers.GlobalMaxPooling1D(name="pooled")  # shows the mask

    def split(x):
        parts = layers.BatchSplit(2, name="split")(x)
        return layers.BatchConcat(name="concat")([pooled(x) for x in parts])

    class MeanLoss(layers.Loss):
        def compute_loss(self, inputs, mask=None):
            x, y = inputs
            weights = K.cast(mask[0], K.floatx())
            loss = K.sum(K.mean(K.square(x - y), axis=-1) * weights)
            return loss / K.sum(weights)

    scale = layers.ScaleOffset
    norm = layers.LayerNormalization
    relative = layers.RelativePositionEmbedding
    cases = {
        "average pooling": layers.GlobalAveragePooling1D(name="layer"),
        "max pooling": pooled,
        "scale offset": scale(name="layer"),
        "scale constant": scale(scale=3.0, offset=-2.0, name="layer"),
        "scale condition": lambda x: scale(
            conditional=True,
            hidden_units=5,
            hidden_activation="swish",
            name="layer",
        )([x, condition(x)]),
        "norm": norm(name="layer"),
        "norm rms": norm(zero_mean=False, offset=False, name="layer"),
        "norm no variance": norm(unit_variance=False, name="layer"),
        "norm condition": lambda x: norm(
            conditional=True, hidden_units=5, name="layer"
        )([x, condition(x)]),
        "concatenate": lambda x: pooled(
            layers.Concatenate1D(name="layer")([x, shorter(x)])
        ),
        "split": split,
        "split parts": lambda x: layers.BatchSplit([1, 2], name="split")(x),
        "attention": attention(),
        "attention sizes": attention(key_size=4, out_dim=7, use_bias=False),
        "attention scores": attention(return_attention_scores=True),
        "attention relu": attention(normalization="squared_relu"),
        "attention plus": attention(normalization="softmax_plus"),
        "attention unscaled": attention(attention_scale=False),
        "attention float bias": attention(
            lambda x: times(x, 0.1), arguments={"a_bias": True}
        ),
        "attention bool bias": attention(
            lambda x: keras.layers.Lambda(
                lambda x: K.batch_dot(x, x, axes=[2, 2]) > -1.0, name="scores"
            )(x),
            arguments={"a_bias": True},
        ),
        "attention rotary": attention(
            sinusoidal, arguments={"p_bias": "rotary"}
        ),
        "attention relative": attention(
            lambda x: relative(9, 6, name="pos")([x, x]),
            arguments={"p_bias": "typical_relative"},
        ),
        "attention t5": attention(
            lambda x: layers.RelativePositionEmbeddingT5(
                8, 2, max_distance=6, name="pos"
            )([x, x]),
            arguments={"p_bias": "t5_relative"},
        ),
        "attention t5 causal": attention(
            lambda x: layers.RelativePositionEmbeddingT5(
                8, 2, max_distance=6, bidirectional=False, name="pos"
            )([x, x]),
            arguments={"p_bias": "t5_relative"},
        ),
        "gau": gau(),
        "gau softmax": gau(normalization="softmax_plus", use_bias=False),
        "gau rotary": lambda x: gau()([x, sinusoidal(x)], p_bias="rotary"),
        "gau bias": lambda x: gau(attention_scale=False)(
            [x, times(x, 0.1)], a_bias=True
        ),
        "position": layers.PositionEmbedding(12, 12, name="layer"),
        "position mul": layers.PositionEmbedding(12, 12, "mul", name="layer"),
        "position concat": layers.PositionEmbedding(
            12, 5, "concat", name="layer"
        ),
        "position hierarchical": layers.PositionEmbedding(
            4, 12, "zero", hierarchical=0.3, name="layer"
        ),
        "sinusoidal": layers.SinusoidalPositionEmbedding(12, name="layer"),
        "sinusoidal mul": layers.SinusoidalPositionEmbedding(
            12, "mul", name="layer"
        ),
        "sinusoidal concat": layers.SinusoidalPositionEmbedding(
            4, "concat", name="layer"
        ),
        "sinusoidal custom": lambda x: layers.SinusoidalPositionEmbedding(
            12, "add", custom_position_ids=True, name="layer"
        )([x, keras.layers.Lambda(lambda x: x[..., 0], name="ids")(x)]),
        "feed forward": layers.FeedForward(9, "relu", name="layer"),
        "feed forward gated": layers.FeedForward(
            9, ["swish", "linear"], use_bias=False, name="layer"
        ),
        "crf": layers.ConditionalRandomField(name="layer"),
        "memm": layers.MaximumEntropyMarkovModel(name="layer"),
        "pointer": layers.GlobalPointer(2, 6, name="layer"),
        "pointer square": layers.GlobalPointer(
            2, 6, RoPE=False, tril_mask=False, use_bias=False, name="layer"
        ),
        "efficient pointer": layers.EfficientGlobalPointer(2, 6, name="layer"),
        "efficient pointer square": layers.EfficientGlobalPointer(
            2, 6, RoPE=False, tril_mask=False, name="layer"
        ),
        "loss": lambda x: MeanLoss(1, name="layer")(
            [x, keras.layers.Dense(12, name="dense")(x)]
        ),
    }
    return {f"layer {name}": function for name, function in cases.items()}


def optimizer_cases():
    """Returns optimizers by the case's name."""
    from bert4keras import optimizers as o
    from bert4keras.backend import keras

    adam = {"learning_rate": 0.01}
    decay = o.extend_with_weight_decay(o.Adam, "AdamDecay")
    lamb = o.extend_with_layer_adaptation(decay, "Lamb")
    linear = o.extend_with_piecewise_linear_lr(o.Adam, "AdamLinear")
    schedule = {"lr_schedule": {2: 1.0, 5: 0.1}}
    return {
        "adam": o.Adam(**adam),
        "adam without correction": o.Adam(**adam, bias_correction=False),
        "adam clipped": o.Adam(**adam, clipnorm=0.5),
        "lion": o.Lion(learning_rate=0.01),
        "adafactor": o.AdaFactor(learning_rate=0.01, min_dim_size_to_factor=2),
        "adafactor relative": o.AdaFactor(
            learning_rate=None, beta1=0.9, exclude_from_parameter_scale=["bias"]
        ),
        "weight decay": decay(
            **adam, weight_decay_rate=0.1, exclude_from_weight_decay=["bias"]
        ),
        "layer adaptation": lamb(
            **adam,
            weight_decay_rate=0.1,
            exclude_from_layer_adaptation=["bias"],
        ),
        "piecewise linear": linear(**adam, **schedule),
        "piecewise linear adafactor": o.extend_with_piecewise_linear_lr(
            o.AdaFactor
        )(learning_rate=0.01, **schedule),
        "accumulation": o.extend_with_gradient_accumulation(linear)(
            **adam, **schedule, grad_accum_steps=3
        ),
        "lazy": o.extend_with_lazy_optimization(o.Adam)(
            **adam, include_in_lazy_optimization=["embeddings"]
        ),
        "average": o.extend_with_exponential_moving_average(o.Adam)(
            **adam, ema_momentum=0.8
        ),
        "parameter-wise": o.extend_with_parameter_wise_lr(o.Adam)(
            **adam, paramwise_lr_schedule={"embeddings": 10, "Dense": 0.1}
        ),
        "schedule of keras": o.Adam(
            learning_rate=keras.optimizers.schedules.ExponentialDecay(
                0.02, 3, 0.5
            )
        ),
    }
