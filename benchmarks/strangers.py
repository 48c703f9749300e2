"""Public repositories whose scripts are run on Keras 3, and data for them.

Nothing of the repositories is kept here. A data file is made at the moment a
script opens it, from its path: `RULES` say by the name of the data set, as the
field knows it, what a line of it looks like. Checkpoints are made when
bert4keras asks for them: random, of the shapes of the model that asks.
"""

import json
import os
import pathlib
import re
import sys
import textwrap

import numpy as np

# The scripts of a repository that are run: those that import bert4keras and
# that no other script imports. Some want arguments.
REPOSITORIES = {
    "bojone/CLUE-bert4keras": {},
    "bojone/LST-CLUE": {},
    "bojone/CoSENT": {"": ["LCQMC"], "_nli": []},
    "bojone/SimCSE": {"eval.py": ["BERT", "cls", "LCQMC", "0.1"]},
    "bojone/BERT-whitening": {
        "chn/eval.py": ["BERT", "first-last-avg", "LCQMC", "8"],
        "eng/eval.py": ["base", "STS-B", "8", "target"],
        "eng/nli_train.py": ["base"],
    },
    "bojone/r-drop": {},
    "bojone/GPLinker": {},
    "bojone/P-tuning": {},
    "bojone/Pattern-Exploiting-Training": {},
    "bojone/t5_in_bert4keras": {},
    "bojone/bert-of-theseus": {},
    "bojone/oppo-text-match": {},
    "bojone/univae": {},
    "nishiwen1214/GLUE-bert4keras": {},
    "nishiwen1214/SuperGLUE-bert4keras": {},
    "i4never/bert4keras-CMLM": {},
    "447428054/JDNER-reproduce": {},
    "hanggun/bert4keras-seq2seq": {},
    "MathWordProblem/mwp_bert4keras": {},
    "Xuanfang1121/bert4keras_relation": {},
    "liuliuNLP/bert4keras-multi_class": {},
    "qq1065507891/bert4keras_classifier": {},
}
# Settings of a script, where several share a file of them, and numbers of
# epochs: (script, file, what stands there, what is put there).
SETTINGS = (
    ("JDNER", "GP_", "start_epoch=4", "start_epoch=2"),
    ("hanggun/.*py$", "config", "is_train = False", "is_train = True"),
    ("for_csl", "config", "yamls/multi30k", "yamls/csl10k"),
    ("gau_.*for_csl", "config", "csl10k", "csl10k_with_pretrain"),
    ("bert_.*multi30k", "config", "multi30k", "multi30k_with_pretrain"),
)
# Folders that a script writes to and does not make.
FOLDERS = {"hanggun/bert4keras-seq2seq": ["saved_model"]}
ROWS = 12
MORE_ROWS = (r"sentiment\.", 200)  # one row in a hundred is labelled
# Scripts that end for a reason of their own, which is not Keras's.
OWN_ERRORS = {
    "bojone/CoSENT/accuracy/": (
        "writes an array of one number by `%.5f`, which NumPy refuses today"
    ),
    "nishiwen1214/GLUE-bert4keras/RTE.py": "does not import Lambda",
    "MathWordProblem/mwp_bert4keras/predict.py": (
        "says `name` where it means `__name__`"
    ),
    "qq1065507891/bert4keras_classifier/main.py": (
        "reads settings that its config.py does not have"
    ),
    "bojone/GPLinker/duie_v1.py": "looks up spo_list, which it calls spoes",
    "bojone/CLUE-bert4keras/src/cluener.py": (
        "finds no entity at [CLS], where a random model may see one"
    ),
    "bojone/LST-CLUE/src/cluener.py": (
        "finds no entity at [CLS], where a random model may see one"
    ),
}
# Labels by the name of the data set; 0 and 1 where none is named.
LABELS = (
    (r"short_news", ["文化", "娱乐"]),
    (r"WNLI", [0, 1]),
    (r"tnews", ["100", "101"]),
    (r"(RTE|QNLI|AX)", ["entailment", "not_entailment"]),
    (r"(nli|snli|NLI|CB|cnsd)\b", ["entailment", "neutral", "contradiction"]),
    (r"wsc/", ["true", "false"]),
    (r"(BoolQ|WSC|WiC)", [True, False]),
)
# Columns by the name of the file: two texts a and b, a label y, a score s,
# numbers of tokens n and m, and anything else. `^` is a line of headings.
COLUMNS = (
    (r"senteval_cn/", "aby"),
    (r"CoLA/test", "^.a"),
    (r"CoLA/", ".y.a"),
    (r"SST-2/test", "^.a"),
    (r"SST-2/", "^ay"),
    (r"STS-B/test", "^.......ab"),
    (r"STS-B/sts-test", "....sab"),
    (r"STS-B/", "^.......abs"),
    (r"SICK", "^.abs"),
    (r"MRPC/", "^y..ab"),
    (r"QQP/test", "^.ab"),
    (r"QQP/", "^...aby"),
    (r"MNLI/test", "^........ab"),
    (r"MNLI/dev", "^........ab.....y"),
    (r"MNLI/", "^........abyy"),
    (r"(QNLI|RTE|WNLI)/test", "^.ab"),
    (r"(QNLI|RTE|WNLI)/", "^.aby"),
    (r"sentiment\.", "ay"),
    (r"csl/", "ab"),
    (r"oppo.*test", "nm"),
    (r"oppo", "nmy"),
    (r"", "aby"),
)


def count(path):
    """The number of rows."""
    return MORE_ROWS[1] if re.search(MORE_ROWS[0], path) else ROWS


def texts(path, characters, rows=None):
    """Sentences: English where the data set is, else Chinese."""
    rows = rows or count(path)
    rng = np.random.default_rng(0)
    english = r"(?i)(?<!chine)glue|senteval/|snli|uncased|multi30k"
    english = re.search(english, path)
    if english and not re.search(r"(?i)clue|cnsd", path):
        words = "the a cat dog sees likes old new house tree big red".split()
        return [" ".join(rng.choice(words, 8)) for _ in range(rows)]
    chosen = rng.choice(characters, (rows, 12))
    return ["".join(row) + "。" for row in chosen]


def labels(path):
    """A label for each row."""
    kinds = next((y for rule, y in LABELS if re.search(rule, path)), [0, 1])
    return [kinds[i % len(kinds)] for i in range(count(path))]


def columns(path, characters):
    """A file of columns that tabs separate."""
    rule = next(c for rule, c in COLUMNS if re.search(rule, path))
    first = texts(path, characters)
    second = first[1:] + first[:1]
    lines = []
    for i, (a, b, y) in enumerate(
        zip(first, second, labels(path), strict=True)
    ):
        entries = {"a": a, "b": b, "y": str(y), "s": str(i % 5 + 0.5)}
        entries |= {"n": f"{i + 5} 6 {i + 7}", "m": f"{i + 8} 9", ".": str(i)}
        lines.append("\t".join(entries[c] for c in rule.lstrip("^")))
    return lines if rule[0] != "^" else ["\t".join(rule[1:]), *lines]


def records(path, characters):
    """A file of JSON objects, with all the names that such files have."""
    first = texts(path, characters)
    second = first[1:] + first[:1]
    for i, (a, b, y) in enumerate(
        zip(first, second, labels(path), strict=True)
    ):
        words = a.split(" ")
        span = {"span1_index": 0, "span2_index": 3}
        if len(words) > 1:
            span |= {"span1_text": words[0], "span2_text": words[3]}
        else:
            span |= {"span1_text": a[:2], "span2_text": a[3:5]}
        yield {
            "id": i,
            "idx": i,
            **dict.fromkeys(("sentence", "text", "sentence1"), a),
            **dict.fromkeys(("premise", "passage", "title", "abst"), a),
            **dict.fromkeys(("sentence2", "question", "hypothesis"), b),
            **dict.fromkeys(("label", "gold_label", "label_name"), y),
            "keyword": [a[:2], b[2:4]],
            "synonyms": [b],
            "word": words[0],
            "choice1": a,
            "choice2": b,
            "target": span,
        }


def entities(path, characters):
    for d in records(path, characters):
        d["label"] = {"name": {d["text"][2:4]: [[2, 3]]}}
        if "test" in path.rpartition("/")[2]:
            del d["label"]
        yield d


def numbered_entities(path, characters):
    """Entities whose kinds are numbers."""
    for d in records(path, characters):
        label = {"1": {d["text"][2:4]: [[2, 3]]}}
        yield {"text": d["text"], "label": label}


def problems(path, characters):
    """Sums in words, with their equations (Ape210K)."""
    for a in texts(path, characters):
        text = f"{a[:4]}3{a[4]}2"
        yield {"original_text": text, "equation": "x=3+2", "ans": "5"}


def question_answers(path, characters):
    """Questions with passages that answer them (WebQA, SogouQA)."""
    return [
        {
            "id": d["id"],
            "question": d["question"],
            "passages": [{"passage": d["text"], "answer": d["text"][2:5]}],
        }
        for d in records(path, characters)
    ]


def novel(path, characters):
    return "  ".join(texts(path, characters)).encode("gbk")


def segmented(path, characters):
    """Sentences whose words are separated by spaces (icwb2)."""
    return [
        " ".join([t[:2], t[2:3], t[3:6], t[6:]])
        for t in texts(path, characters)
    ]


def tagged(path, characters):
    """Characters with BIO tags, an empty line between sentences."""
    tags = {2: "B-PER", 3: "I-PER"}
    return [
        "\n".join(f"{c} {tags.get(i, 'O')}" for i, c in enumerate(t)) + "\n"
        for t in texts(path, characters)
    ]


def games(path, characters):
    """Games of Chinese chess."""
    game = {"fen": "", "iccs": "h2e2h9g7" * 4, "items": {"棋局结果": 2}}
    return iter([game] * ROWS)


def captions(path, characters):
    """Annotations of COCO; the picture is written beside them."""
    root, part = path.split("/annotations/captions_")
    picture = pathlib.Path(root, part.removesuffix(".json"), "1.jpg")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(b"P6 4 4 255 " + bytes(range(48)))
    image = {"id": 1, "file_name": "1.jpg", "coco_url": "1.jpg"}
    caption = {"image_id": 1, "caption": "a train on the tracks"}
    return {"images": [image], "annotations": [caption]}


def words_of_sentences(path, characters):
    """A vocabulary of the words of `sentences`, as a script of it makes."""
    words = dict.fromkeys(" ".join(texts(path, characters)).split())
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]


def sheet(path, characters):
    """A spreadsheet of texts and labels."""
    import io

    import pandas as pd

    columns = {"text": texts(path, characters), "label": labels(path)}
    file = io.BytesIO()
    pd.DataFrame(columns).to_excel(file, index=False)
    return file.getvalue()


def answers(path, characters):
    for d in records(path, characters):
        p = d["text"]
        yield {"id": d["id"], "question": d["question"], "context": p}


def squad(path, characters):
    """Questions and answers in the format of SQuAD."""
    return {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": d["text"],
                        "qas": [
                            {
                                "id": str(d["id"]),
                                "question": d["question"],
                                "answers": [
                                    {
                                        "text": d["text"][2:4],
                                        "answer_start": 2,
                                    }
                                ],
                            }
                        ],
                    }
                ]
            }
            for d in records(path, characters)
        ]
    }


def record_of_entities(path, characters):
    """Questions about entities of a text (ReCoRD)."""
    for d in records(path, characters):
        text = d["text"]
        spans = [{"start": 0, "end": 2}]
        answer = {"text": text[:3], "start": 0, "end": 2}
        query = {"idx": d["id"], "query": d["question"], "answers": [answer]}
        passage = {"text": text, "entities": spans}
        yield {"idx": d["id"], "passage": passage, "qas": [query]}


def paragraph_questions(path, characters):
    """Several questions about a text (MultiRC)."""
    for d in records(path, characters):
        several = [{"text": d["text"], "label": i, "idx": i} for i in (0, 1)]
        questions = [{"question": d["question"], "answers": several, "idx": 0}]
        yield {
            "idx": d["id"],
            "passage": {"text": d["text"], "questions": questions},
        }


def dialogues(path, characters):
    """Multiple choice (C3)."""
    return [
        [
            [d["text"]],
            [
                {
                    "question": d["question"],
                    "choice": [d["text"][:3], d["text"][3:6]],
                    "answer": d["text"][:3],
                    "id": d["id"],
                }
            ],
            d["id"],
        ]
        for d in records(path, characters)
    ]


def idioms(path, characters):
    """A gap for an idiom (ChID)."""
    candidates = [t[:4] for t in texts(path, characters)][:10]
    for d in records(path, characters):
        gap = f"{d['text'][:4]}#idiom{d['id']:06d}#{d['text'][4:]}"
        yield {"content": [gap], "candidates": candidates}


def idiom_answers(path, characters):
    return {f"#idiom{i:06d}#": i % 10 for i in range(ROWS)}


def triples(path, characters):
    for d in records(path, characters):
        t = d["text"]
        spo = {"subject": t[:2], "predicate": "是", "object": t[4:7]}
        yield {"text": t, "spo_list": [spo]}


def events(path, characters):
    for d in records(path, characters):
        t = d["text"]
        part = {"role": "人", "argument": t[4:7], "argument_start_index": 4}
        event = {
            "event_type": "行动",
            "trigger": t[:2],
            "trigger_start_index": 0,
            "arguments": [part],
        }
        d["event_list"] = [event]
        yield d


def event_schema(path, characters):
    yield {"event_type": "行动", "role_list": [{"role": "人"}]}


def scores(path, characters):
    return [str(i % 5) for i in range(ROWS)]


def sentences(path, characters):
    return texts(path, characters)


def label_lines(path, characters):
    return [str(y) for y in labels(path)]


def pairs_of_texts(path, characters):
    first = texts(path, characters)
    return [f"{a}\t{b}" for a, b in zip(first, first[::-1], strict=True)]


# What a file holds, by its path. A generator makes lines of JSON, a list of
# strings lines, bytes are the file, anything else is one JSON value.
RULES = (
    (
        r"(all_50_schemas(\.txt)?|DuLE\w+/schema\.json)$",
        lambda *_: iter([{"predicate": "是"}]),
    ),
    (r"_schema\.json$", event_schema),
    (r"duee.*\.json$", events),
    (r"(kg/datasets|DuLE[^/]*)/.*\.json$", triples),
    (r"JD\w*\d\.txt$", numbered_entities),
    (r"ape210k/.*\.json$", problems),
    (r"multi30k/train\.(en|de)\.txt$", words_of_sentences),
    (r"multi30k/", sentences),
    (r"\.xlsx$", sheet),
    (r"(Web|Sogou)QA\.json$", question_answers),
    (r"金庸/", novel),
    (r"THUCNews/", sentences),
    (r"icwb2-data/training", segmented),
    (r"icwb2-data/testing", sentences),
    (r"ner/.*/example\.\w+$", tagged),
    (r"qipu\.json$", games),
    (r"captions_\w+\.json$", captions),
    (r"cluener/.*\.json$", entities),
    (r"cmrc2018/.*\.json$", squad),
    (r"c3/.*\.json$", dialogues),
    (r"chid/.*answer\.json$", idiom_answers),
    (r"chid/.*\.json$", idioms),
    (r"ReCoRD/", record_of_entities),
    (r"MultiRC/", paragraph_questions),
    (r"STS\.gs", scores),
    (r"STS\.input", pairs_of_texts),
    (r"/s[12]\.(train|dev|test)$", sentences),
    (r"/labels\.(train|dev|test)$", label_lines),
    (r"\.jsonl?$", records),
    (r"\.(tsv|csv|data|txt)$", columns),
)


def write_missing(path, characters, writers=()):
    """Writes the file `path`, if a rule knows it and it is not there."""
    path = os.path.abspath(path)
    if os.path.exists(path):
        return
    posix = pathlib.PurePath(path).as_posix()
    rules = (*writers, *RULES)
    make = next((make for rule, make in rules if re.search(rule, posix)), None)
    if make is None:
        return
    made = make(posix, characters)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(made, bytes):
        pathlib.Path(path).write_bytes(made)
        return
    if isinstance(made, list) and made and isinstance(made[0], str):
        lines = made
    elif hasattr(made, "__next__"):
        lines = [json.dumps(x, ensure_ascii=False) for x in made]
    else:
        lines = [json.dumps(made, ensure_ascii=False)]
    pathlib.Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_on_demand(characters, writers=()):
    """From here on a file that is opened to be read is made if it is missing.

    Folders that are to be written to are made, too.
    """
    busy = False

    def hook(event, arguments):
        nonlocal busy
        if event not in ("open", "glob.glob") or busy:
            return
        path, mode = arguments[:2]
        if not isinstance(path, (str, os.PathLike)):
            return
        paths = [path]
        if event == "glob.glob":
            paths = [path.replace("*", str(i)) for i in range(ROWS)]
        elif mode and not mode.startswith("r"):
            return
        busy = True
        try:
            for path in paths:
                write_missing(path, characters, writers)
        finally:
            busy = False

    sys.addaudithook(hook)


def table(results):
    """The lines of the page: how many run, and what each other says."""
    own = {
        name: reason
        for part, reason in OWN_ERRORS.items()
        for name in results
        if name.startswith(part) and results[name] != "ok"
    }
    good = sum(reason == "ok" for reason in results.values())
    by_repository = {}
    for name, reason in results.items():
        owner, repository, script = name.split("/", 2)
        rows = by_repository.setdefault(f"{owner}/{repository}", {})
        rows[script] = f"its own error: {own[name]}" if name in own else reason
    text = (
        f"Untouched, {good} of {len(results) - len(own)} training and "
        f"evaluation scripts of {len(by_repository)} repositories come to "
        f"their end; {len(own)} more end for a reason of their own."
    )
    lines = [
        *textwrap.wrap(text, 80, break_on_hyphens=False),
        "",
        "| repository | scripts | run | what the others say |",
        "|---|---|---|---|",
    ]
    for name, rows in by_repository.items():
        reasons = {}
        for script, reason in rows.items():
            if reason != "ok":
                reasons.setdefault(reason, []).append(script)
        text = "; ".join(
            f"{', '.join(scripts)}: "
            + reason.translate({ord("|"): "/", ord("`"): None})
            for reason, scripts in reasons.items()
        )
        good = sum(reason == "ok" for reason in rows.values())
        link = f"[{name}](https://github.com/{name})"
        lines.append(f"| {link} | {len(rows)} | {good} | {text} |")
    return lines
