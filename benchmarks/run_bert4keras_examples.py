"""Runs bert4keras's own examples, and scripts of strangers, on Keras 3.

    git clone https://github.com/bojone/bert4keras
    python benchmarks/run_bert4keras_examples.py --examples bert4keras/examples

    git clone https://github.com/bojone/CoSENT repositories/bojone/CoSENT
    python benchmarks/run_bert4keras_examples.py --repositories repositories

Each script runs in a process of its own: untouched, by
`python -m blogkeras.bert4keras script.py`; with the line
`import blogkeras.bert4keras` added; and, if that does not do, with the line
`import blogkeras.bert4keras.keras2`. Checkpoints, vocabularies and data are
made when a script asks for them, by the rules in `strangers.py`: random and
tiny. Paths, sizes and epochs are changed: texts are short, training stops after
two steps and a web server after one request. A script runs if it comes to its
end. The tables go into docs/bert4keras.md; with `--folder` they grow from call
to call.

Of the repositories listed in `strangers.py` those are run that are in the
folder; their scripts run untouched only.

The scripts also need: pip install bottle cchess jieba nltk
opencv-python-headless pandas rouge scipy sympy
"""

import argparse
import collections
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback

import strangers
from harness import page

DOCS = page.ROOT / "docs/bert4keras.md"
HIDDEN = 16
# Lengths of texts, and numbers of sampling steps.
SIZES = r"^(max\w*len|\w*steps) = (\d+)\b"
# Sizes of models, as entries of a dictionary or as arguments.
MODEL_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "attention_head_n": 2,
    "attention_block_n": 2,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
# Absolute paths in strings.
ABSOLUTE = r"""(?<=["'])/(?=(?:root|home|data|mnt|Users|search|opt)/)"""
PIECES = r"""(?<=["'])[^"'\s]+\.model(?=["'])"""  # models of SentencePiece
LIMIT = """
import functools, json, os, sys, wsgiref.util
import keras
_fit = keras.Model.fit
def fit(self, *args, **kwargs):
    steps = kwargs.get("steps_per_epoch") or 2
    # An average of weights over epochs starts after the second.
    epochs = 3 if "swa" in sys.modules else 1
    kwargs.update(epochs=epochs, steps_per_epoch=min(steps, 2))
    if kwargs.get("validation_steps"):
        kwargs["validation_steps"] = 1
    return _fit(self, *args, **kwargs)
keras.Model.fit = fit
# A tiny random model may never be good enough for the script to save it.
_load = keras.Model.load_weights
def load_weights(self, path, *args, **kwargs):
    if os.path.exists(path):
        _load(self, path, *args, **kwargs)
keras.Model.load_weights = load_weights
import blogkeras.bert4keras
from blogkeras.bert4keras import saving
_load_any = saving.load_weights
def load_any(self, path, *args, **kwargs):
    if os.path.exists(path):
        _load_any(self, path, *args, **kwargs)
saving.load_weights = load_any
images = keras.applications.mobilenet_v2
images.MobileNetV2 = functools.partial(images.MobileNetV2, weights=None)
try:
    import bottle
    def serve(**kwargs):
        app = bottle.default_app()
        for route in app.routes:
            request = {{}}
            wsgiref.util.setup_testing_defaults(request)
            request.update(PATH_INFO=route.rule, QUERY_STRING="text=a&n=2&k=1")
            answer = json.loads(b"".join(app(request, lambda *_: None)))
            if answer["code"]:
                raise RuntimeError(answer["desc"])
    bottle.run = serve
except ImportError:
    pass
"""
PLAIN = "import runpy; runpy.run_path({0!r}, run_name='__main__')"
MAIN = "from blogkeras.bert4keras.__main__ import main; main([{0!r}, *{1!r}])"
# A checkpoint that is not there is made, of the shapes of its model.
CHECKPOINTS = """
import numpy as np
import blogkeras.bert4keras
from bert4keras.models import Transformer
def values(self):
    rng = np.random.default_rng(0)
    for layer, names in self.variable_mapping().items():
        layer = self.layers.get(self.prefixed(layer))
        weights = getattr(layer, "trainable_weights", [])
        for name, weight in zip(names, weights):
            array = np.zeros(tuple(weight.shape), "float32")
            _, array = self.create_variable(name, array)
            shape = array.shape
            if shape[:1] == (self.vocab_size,):  # of the file, not the model
                rows = self.vocab_size - len(self.compound_tokens or ())
                if self.keep_tokens:
                    rows = max(self.keep_tokens) + 1
                shape = (rows, *shape[1:])
            yield name, rng.normal(0, 0.02, shape).astype("float32")
_read = Transformer.load_weights_from_checkpoint
def load(self, checkpoint, *args, **kwargs):
    if not os.path.exists(f"{{checkpoint}}.index"):
        checkpoint = dict(values(self))
    _read(self, checkpoint, *args, **kwargs)
Transformer.load_weights_from_checkpoint = load
"""
# name: (program, added line)
KINDS = {
    "untouched": (MAIN, ""),
    "line": (PLAIN, "import blogkeras.bert4keras\n"),
    "keras2": (PLAIN, "import blogkeras.bert4keras.keras2\n"),
}
BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "type_vocab_size": 2,
}


def vocabulary(characters):
    """The tokens of a vocabulary of characters."""
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100))]
    tokens += ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>"]
    words = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    words += characters
    return [*tokens, *words, *("##" + word for word in words)]


def configuration(path, layers, tokens, pieces):
    """A configuration for the model that the end of the path names."""
    path = "/".join(path.split("/")[-3:])
    config = {**BERT, "num_hidden_layers": layers, "vocab_size": len(tokens)}
    if "albert" in path:
        config["embedding_size"] = 8
    if "t5" in path:
        config["hidden_act"] = ["gelu", "linear"]
    if "nezha_gpt" in path:
        config["type_vocab_size"] = 0
    if "CPM" in path:  # its longest prompt is of 680 tokens here
        config |= {"max_position_embeddings": 1024, "vocab_size": pieces}
    return config


def write_pieces(path, characters):
    """Writes a small SentencePiece model; returns its number of pieces."""
    import sentencepiece

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(strangers.texts("", characters, 200)),
            model_writer=file,
            vocab_size=len(characters) + 100,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=3,
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(str(path)).get_piece_size()


def in_a_process(function, seconds=None, log=None):
    """Calls `function` in a fork of this process; returns the exit status.

    TensorFlow is imported but idle here, so that each fork has it at once.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if log:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            signal.alarm(seconds or 0)
            function()
            status = 0
        except SystemExit as error:
            status = int(bool(error.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_in(code, folder, seconds, before=None):
    def script():
        os.chdir(folder)
        sys.path.insert(0, "")
        if before:
            before()
        exec(code, {"__name__": "__main__"})

    log = pathlib.Path(tempfile.mkstemp()[1])
    status = in_a_process(script, seconds, log)
    if status == 0:
        return "ok"
    if status == -signal.SIGALRM:
        return f"still running after {seconds} s"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if os.environ.get("SHOW_LOG"):
        print("\n".join(lines[-40:]))
    lines = [x.strip() for x in lines if x.strip()]
    errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception)\b", x)]
    last = (errors or lines)[-1]
    return (lines[-2] if "Graph execution error" in last else last)[:160]


def small(match):
    name, size = match[1], int(match[2])
    size = max(size // 100, 1) if "steps" in name else min(size, 64)
    return f"{name} = {size}"


def table(results):
    """Returns the lines of the table, and those of the score."""
    score = collections.Counter()
    rows = []
    for name, found in results.items():
        ok = {kind: reason == "ok" for kind, reason in found.items()}
        # What runs with the first line is not tried with the second.
        ok["keras2"] = ok["line"] or ok["keras2"]
        score.update({kind: int(value) for kind, value in ok.items()})
        reasons = dict.fromkeys(v for v in found.values() if v != "ok")
        reasons = "; ".join(
            f"`{r.translate({ord('|'): '/', ord('`'): None})}`" for r in reasons
        )
        marks = (("no", "yes")[ok[kind]] for kind in KINDS)
        rows.append(f"| {name} | {' | '.join(marks)} | {reasons} |")
    total = len(results)
    text = (
        f"Untouched, {score['untouched']} of {total} scripts come to their "
        f"end; with `import blogkeras.bert4keras` {score['line']}; where that "
        "does not do, with `import blogkeras.bert4keras.keras2` instead, "
        f"{score['keras2']}."
    )
    return [
        *textwrap.wrap(text, 80, break_on_hyphens=False),
        "",
        "| script | untouched | line | or `.keras2` | what it says if not |",
        "|---|---|---|---|---|",
        *rows,
    ]


def scripts_of(root):
    """The scripts of a repository that train or evaluate a model."""
    sources = {
        path.relative_to(root): path.read_text("utf-8", "replace")
        for path in sorted(root.rglob("*.py"))
    }
    imported, scripts = set(), {}
    for path, source in sources.items():
        names = set(re.findall(r"^(?:from|import) (\w+)", source, re.M))
        imported |= names
        # What a script does may stand in a module beside it.
        beside = [sources.get(path.with_name(f"{name}.py")) for name in names]
        whole = "\n".join([source, *filter(None, beside)])
        uses = re.search(r"^(from|import) bert4keras", whole, re.M)
        works = re.search(r"\.(fit|fit_generator|predict|compile)\(", whole)
        if uses and works and "bert4keras" not in path.parts:
            scripts[path] = source
    # What others import is a script where it has something to do by itself.
    return [
        path
        for path, source in scripts.items()
        if path.stem not in imported or "__main__" in source
    ]


def shrunk(source, root):
    """A script with its absolute paths under `root`, and small sizes."""
    source = re.sub(ABSOLUTE, f"{root.as_posix()}/", source)
    for name, size in MODEL_SIZES.items():
        source = re.sub(
            rf"(\b{name}['\"]?\s*[=:]\s*)\d+", rf"\g<1>{size}", source
        )
    return re.sub(SIZES, small, source, flags=re.MULTILINE)


def characters_of(root):
    """The Chinese characters of all scripts, and of what our data say."""
    files = root.rglob("*.py")
    text = "".join(path.read_text("utf-8", "replace") for path in files)
    text = text.encode("gbk", "ignore").decode("gbk") + "是人行动文化娱乐"
    return sorted(set(re.findall("[\u4e00-\u9fff]", text)))


def run(root, path, characters, seconds, kind="untouched", arguments=()):
    """Returns `ok`, or the reason why a script does not run.

    Args:
        root: The repository's folder, of which a copy is made.
        path: The script's path in it.
        characters: Those that the vocabulary has.
        seconds: Integer. The script is ended after them.
        kind: Key of `KINDS`.
        arguments: Of its command line.
    """
    program, line = KINDS[kind]
    label = "/".join([*root.parts[-2:], path.as_posix()])
    tokens = vocabulary(characters)
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary) / "copy"
        home = pathlib.Path(temporary) / "home"
        shutil.copytree(root, copy)
        for file in (*copy.rglob("*.py"), *copy.rglob("*.yaml")):
            text = shrunk(file.read_text("utf-8", "replace"), home)
            for script, part, old, new in strangers.SETTINGS:
                if re.search(script, label) and part in file.name:
                    text = text.replace(old, new)
            file.write_text(text, "utf-8")
        for made in strangers.FOLDERS.get("/".join(root.parts[-2:]), []):
            (copy / path.parent / made).mkdir(exist_ok=True)
        source = (copy / path).read_text("utf-8")
        start = source.rfind("from __future__")
        start = source.find("\n", start) + 1 if start >= 0 else 0
        (copy / path).write_text(source[:start] + line + source[start:])
        # Some are written for a fixed number of layers.
        deep = (
            re.search("theseus|univae", label) or "bert_layers = 12" in source
        )

        def before():
            pieces = 0
            for model in set(re.findall(PIECES, source)):
                pieces = write_pieces(pathlib.Path(model), characters)
            writers = (
                (
                    r"config\w*\.json$",
                    lambda path, _: configuration(
                        path, 12 if deep else 2, tokens, pieces
                    ),
                ),
                (r"vocab\.txt$", lambda *_: tokens),
                (r"keep_tokens\.json$", lambda *_: list(range(pieces or 200))),
            )
            strangers.write_on_demand(characters, writers)

        code = (LIMIT + CHECKPOINTS + program).format(path.name, arguments)
        return run_in(code, (copy / path).parent, seconds, before)


def run_repository(root, options, folder):
    """Runs the scripts of one repository, and keeps what each says."""
    name = "/".join(root.parts[-2:])
    characters = characters_of(root)
    for path in scripts_of(root):
        label = f"{name}/{path.as_posix()}"
        result = folder / "strangers" / f"{label.replace('/', '+')}.json"
        if not any(part in label for part in options.only):
            continue
        if result.exists() and options.only == [""]:
            continue
        given = strangers.REPOSITORIES[name]
        arguments = next((a for p, a in given.items() if p in str(path)), [])
        said = run(root, path, characters, options.seconds, arguments=arguments)
        print(f"{label:60} {said}", flush=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(said), "utf-8")


def run_examples(options, folder):
    """Runs bert4keras's own examples, and puts the table into the page."""
    scripts = sorted(path.name for path in options.examples.glob("*.py"))
    characters = characters_of(options.examples)
    for name in scripts:
        if not any(part in name for part in options.only):
            continue
        found, path = {}, pathlib.Path(name)
        for kind in KINDS:
            if kind == "keras2" and found["line"] == "ok":
                continue
            found[kind] = run(
                options.examples, path, characters, options.seconds, kind
            )
            print(f"{name:50} {kind:10} {found[kind]}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(found), "utf-8")
    results = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in scripts
        if (folder / f"{name}.json").exists()
    }
    if not results:
        return
    lines = table(results)
    left = sorted(set(scripts) - results.keys())
    if left:
        text = f"Not tried: {', '.join(left)}."
        lines += ["", *textwrap.wrap(text, 80, break_on_hyphens=False)]
    page.put(DOCS, "examples", lines)


def run_strangers(options, folder):
    """Runs scripts of repositories, and puts the table into the page."""
    for name in strangers.REPOSITORIES:
        root = options.repositories / name
        if root.exists():
            run_repository(root, options, folder)
    results = {
        path.stem.replace("+", "/"): json.loads(path.read_text("utf-8"))
        for name in strangers.REPOSITORIES
        for path in sorted(
            (folder / "strangers").glob(f"{name.replace('/', '+')}+*.json")
        )
    }
    if results:
        page.put(DOCS, "strangers", strangers.table(results))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=pathlib.Path)
    parser.add_argument("--repositories", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", default=[""], metavar="PART")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument(
        "--folder", type=pathlib.Path, help="keep files and results here"
    )
    options = parser.parse_args()
    for name in ("examples", "repositories"):
        if folder := getattr(options, name):
            setattr(options, name, folder.absolute())
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    importlib.import_module("keras")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or pathlib.Path(temporary)).absolute()
        if options.examples:
            run_examples(options, folder)
        if options.repositories:
            run_strangers(options, folder)


if __name__ == "__main__":
    main()
