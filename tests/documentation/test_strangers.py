"""The data that scripts of strangers find: made by the path of a file."""

import json
import pathlib
import sys

import pytest
from kit import JAX

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import strangers  # noqa: E402

pytestmark = pytest.mark.skipif(JAX, reason="once is enough")

CHARACTERS = list("一二三四五六七八九十百千万天地人")


def made(path):
    strangers.write_missing(path, CHARACTERS)
    return pathlib.Path(path)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("CLUE/iflytek/train.json", ["sentence", "label"]),
        ("ner/cluener/dev.json", ["text", "label"]),
        ("SuperGLUE/ReCoRD/val.jsonl", ["passage", "qas"]),
        ("kg/datasets/train_data.json", ["text", "spo_list"]),
        ("ape210k/test.ape.json", ["original_text", "equation", "ans"]),
        ("data/JD5/JDtrain0.txt", ["text", "label"]),
        ("qipu.json", ["fen", "iccs", "items"]),
    ],
)
def test_lines_of_json(tmp_path, path, names):
    lines = made(tmp_path / path).read_text("utf-8").splitlines()
    assert len(lines) >= strangers.ROWS
    for line in lines:
        assert set(names) <= set(json.loads(line))


def test_entities_stand_where_they_are_said_to_be(tmp_path):
    for line in made(tmp_path / "JDtest1.txt").read_text("utf-8").splitlines():
        row = json.loads(line)
        for kind, spans in row["label"].items():
            assert kind.isdigit()
            for word, ((start, end),) in spans.items():
                assert row["text"][start : end + 1] == word


def test_columns_are_those_of_the_data_set(tmp_path):
    lines = made(tmp_path / "glue/MRPC/train.tsv").read_text().splitlines()
    assert {len(line.split("\t")) for line in lines[1:]} == {5}
    lines = made(tmp_path / "lcqmc/lcqmc.test.data").read_text("utf-8")
    for line in lines.splitlines():
        a, b, label = line.split("\t")
        assert a != b
        assert label in "01"


def test_files_that_are_there_or_unknown_are_left_alone(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("mine", encoding="utf-8")
    assert made(path).read_text("utf-8") == "mine"
    assert not made(tmp_path / "model.h5").exists()


def test_bytes_and_what_stands_beside(tmp_path):
    novel = made(tmp_path / "金庸/一/一.txt").read_bytes()
    assert set(novel.decode("gbk")) <= {*CHARACTERS, "。", " ", "\n"}
    page = made(tmp_path / "coco/annotations/captions_val2014.json")
    (image,) = json.loads(page.read_text("utf-8"))["images"]
    assert (tmp_path / "coco/val2014" / image["file_name"]).exists()


def test_the_table_counts_own_errors_apart():
    results = {
        "bojone/SimCSE/eval.py": "ok",
        "bojone/univae/univae.py": "ValueError: a | b",
        "nishiwen1214/GLUE-bert4keras/RTE.py": "NameError: Lambda",
    }
    text = "\n".join(strangers.table(results))
    assert "1 of 2 training" in text.replace("\n", " ")
    assert "1 more end for a reason of their own" in text.replace("\n", " ")
    assert "univae.py: ValueError: a / b" in text
    assert "RTE.py: its own error: does not import Lambda" in text
