"""The label file: what it may say, and one clear line for what it may not."""

import logging

import pytest
from classification_data import write_csv

from nnunetv2_hiendmae.classification.labels import read_labels
from nnunetv2_hiendmae.errors import UserError

CASES = ["Dataset001_A/a", "Dataset001_A/b", "Dataset001_A/c"]


def labels_of(path, rows, header=("case", "label"), cases=CASES, classes=None):
    return read_labels(write_csv(path / "cases.csv", rows, header), cases, classes)


def test_names_with_and_without_the_dataset_in_any_order(tmp_path):
    labels = labels_of(tmp_path, [("c", "ill"), ("Dataset001_A/a", "well"), (" b ", "ill")])
    assert labels.classes == ("ill", "well")
    assert labels.targets == {"Dataset001_A/a": 1, "Dataset001_A/b": 0, "Dataset001_A/c": 0}
    assert list(labels.targets) == CASES and labels.places is None
    other_order = labels_of(tmp_path, [("a", "well"), ("b", "ill"), ("c", "ill")])
    assert other_order.digest() == labels.digest()
    changed = labels_of(tmp_path, [("a", "well"), ("b", "well"), ("c", "ill")])
    assert changed.digest() != labels.digest()


def test_whole_numbers_are_ordered_by_value(tmp_path):
    assert labels_of(tmp_path, [("a", 10), ("b", 9), ("c", -1)]).classes == ("-1", "9", "10")
    assert labels_of(tmp_path, [("a", 10), ("b", 9), ("c", "x")]).classes == ("10", "9", "x")


def test_other_columns_quotes_a_byte_order_mark_and_empty_lines(tmp_path):
    file = tmp_path / "cases.csv"
    file.write_bytes(b'\xef\xbb\xbfage,label,case,fold\r\n71,"ill, badly",a,2\r\n\r\n5,well,b,0\r\n')
    labels = read_labels(file, CASES[:2])
    assert labels.classes == ("ill, badly", "well")
    assert labels.column == "fold" and labels.places == {"Dataset001_A/a": "2", "Dataset001_A/b": "0"}


def test_cases_without_a_label_are_ignored_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        labels = labels_of(tmp_path, [("a", 0), ("b", 1)])
    assert list(labels.targets) == CASES[:2]
    assert "1 of 3 preprocessed cases have no label" in caplog.text and "Dataset001_A/c" in caplog.text


def test_the_same_name_in_two_datasets_needs_its_dataset(tmp_path):
    cases = ["Dataset001_A/a", "Dataset002_B/a", "Dataset002_B/b"]
    with pytest.raises(UserError, match=r"line 2 .*'a' is in several datasets.*Dataset001_A/a, Dataset002_B/a"):
        labels_of(tmp_path, [("a", 0), ("b", 1)], cases=cases)
    labels = labels_of(tmp_path, [("Dataset001_A/a", 0), ("Dataset002_B/a", 1), ("b", 1)], cases=cases)
    assert list(labels.targets.values()) == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty, needed a header"),
        ("case,label\na,ill\a\nb,ill\n", r"line 2 .* has an invisible character in label 'ill\\x07'"),
        ("case,label\na,ill\nb,i\u200bll\n", r"line 3 .* has an invisible character in label 'i\\u200bll'"),
        ("case,label\n", r"empty below its header"),
        ("a,0\nb,1\n", r"no column 'case' \(its first line: a, 0\)"),
        ("case;label\na;0\n", r"separated by ';', needed commas"),
        ("case\tlabel\na\t0\n", r"separated by '\\t', needed commas"),
        ("case,diagnosis\na,0\n", r"no column 'label'"),
        ("case,label,label\na,0,1\n", r"column 'label' twice"),
        ("case,label,fold,split\na,0,1,train\n", r"columns 'fold' and 'split'"),
        ("case,label\na,0\nb\n", r"line 3 .* has 1 values, needed 2"),
        ("case,label\na,0\nb,\n", r"line 3 .* has no label"),
        ("case,label,fold\na,0,1\nb,1,\n", r"line 3 .* has no fold"),
        ("case,label\na,0\nb,1\na,1\n", r"names Dataset001_A/a twice \(lines 2 and 4\)"),
        ("case,label\na,0\nDataset001_A/a,1\n", r"names Dataset001_A/a twice \(lines 2 and 3\)"),
        ("case,label\na,0\nb,0\n", r"all cases .* have the label '0', needed at least two classes"),
        ("case,label\na,0\nb,1\nx,1\ny,0\n", r"2 cases .* are not preprocessed: x, y .*hiendmae preprocess"),
        ("case,label\na,0\nb,1.0\nc,1\n", r"labels that look like one: '1' and '1.0'; needed one spelling"),
        ("case,label\na,Ill\nb,well\nc,ill\n", r"labels that look like one: 'Ill' and 'ill'"),
        ("case,label\na,no finding\nb,well\nc,No  finding\n", r"labels that look like one: "),
        ("case,label,fold\na,0,0\nb,1,0.0\nc,1,1\n", r"folds that look like one: '0' and '0.0'"),
        (b"case,label\na,\xff\n", r"not a CSV file in UTF-8"),
        ('case,label\na,"0\n', r"not a CSV file in UTF-8"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "cases.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_labels(file, CASES)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no label file"):
        read_labels(tmp_path, CASES)


def test_labels_for_a_trained_model(tmp_path):
    labels = labels_of(tmp_path, [("a", "well")], classes=("well", "ill"))
    assert labels.classes == ("well", "ill") and labels.targets == {"Dataset001_A/a": 0}
    with pytest.raises(UserError, match="does not know: dead; needed well, ill"):
        labels_of(tmp_path, [("a", "dead")], classes=("well", "ill"))
