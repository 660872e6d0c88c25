"""Folds and fractions: stratified, seeded, nested, and independent of the file's order."""

from collections import Counter

import pytest
from classification_data import write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from nnunetv2_hiendmae.classification.labels import Labels, Split, choose_split, read_labels
from nnunetv2_hiendmae.errors import UserError


def make(counts, places=None, column=None) -> Labels:
    targets = [index for index, count in enumerate(counts) for _ in range(count)]
    names = [f"Dataset001_A/c{i:03d}" for i in range(len(targets))]
    return Labels(
        tuple("abcdefgh"[: len(counts)]),
        dict(zip(names, targets, strict=True)),
        dict(zip(names, places, strict=True)) if places else None,
        column,
    )


def per_class(labels: Labels, cases) -> Counter:
    return Counter(labels.targets[case] for case in cases)


counts = st.lists(st.integers(5, 40), min_size=2, max_size=4)


@settings(deadline=None, max_examples=50)
@given(counts=counts, seed=st.integers(0, 1000))
def test_folds_partition_the_cases_and_keep_the_mix(counts, seed):
    labels = make(counts)
    splits = [choose_split(labels, str(fold), 1.0, seed) for fold in range(5)]
    for split in splits:
        assert not set(split.train) & set(split.val) and set(split.train) | set(split.val) == set(labels.targets)
        for index, count in enumerate(counts):
            assert abs(per_class(labels, split.val)[index] - count / 5) < 1
    assert sorted(case for split in splits for case in split.val) == list(labels.targets)


@settings(deadline=None, max_examples=50)
@given(
    counts=counts, seed=st.integers(0, 1000), shares=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2).map(sorted)
)
def test_fractions_are_nested_and_stratified(counts, seed, shares):
    labels = make(counts)
    small, large = (choose_split(labels, "1", share, seed) for share in shares)
    whole = choose_split(labels, "1", 1.0, seed)
    assert set(small.train) <= set(large.train) <= set(whole.train)
    assert small.val == large.val == whole.val
    for index, count in per_class(labels, whole.train).items():
        assert abs(per_class(labels, small.train)[index] - shares[0] * count) <= max(0.5, 1 - shares[0] * count)
        assert per_class(labels, small.train)[index] >= 1


@settings(deadline=None, max_examples=20)
@given(counts=counts, seed=st.integers(0, 1000))
def test_a_fraction_prefers_the_same_cases_in_every_fold(counts, seed):
    labels = make(counts)
    whole = [choose_split(labels, fold, 1.0, seed).train for fold in "01"]
    kept = [set(choose_split(labels, fold, 0.3, seed).train) & set(whole[0]) & set(whole[1]) for fold in "01"]
    for index in range(len(counts)):
        first, second = (cases & set(labels.of_class(index)) for cases in kept)
        assert first <= second or second <= first


@pytest.mark.parametrize("fraction, kept", [(0.145, 15), (0.144, 14), (0.29, 29), (0.001, 1)])
def test_fractions_are_rounded_halves_up_as_written(fraction, kept):
    """As `hiendmae splits` rounds; in binary 100 times 0.145 is below 14.5."""
    labels = make([125, 125])
    assert per_class(labels, choose_split(labels, "0", fraction, 0).train) == {0: kept, 1: kept}


def test_folds_are_those_of_scikit_learn():
    labels = make([12, 9])
    cases, targets = list(labels.targets), list(labels.targets.values())
    expected = StratifiedKFold(5, shuffle=True, random_state=7).split(cases, targets)
    for fold, (train, val) in enumerate(expected):
        split = choose_split(labels, str(fold), 1.0, 7)
        assert split == Split(tuple(cases[i] for i in train), tuple(cases[i] for i in val))
    assert choose_split(labels, None, 1.0, 7) == choose_split(labels, "0", 1.0, 7)
    assert choose_split(labels, "0", 1.0, 8) != choose_split(labels, "0", 1.0, 7)
    assert choose_split(labels, "0", 0.5, 8).train != choose_split(labels, "0", 0.5, 7).train


def test_the_order_of_the_file_does_not_matter(tmp_path):
    cases = [f"Dataset001_A/c{i:02d}" for i in range(20)]
    rows = [(case, i % 2) for i, case in enumerate(cases)]
    splits = []
    for order in (rows, rows[::-1]):
        labels = read_labels(write_csv(tmp_path / "x.csv", order), cases)
        splits.append(choose_split(labels, "3", 0.5, 0))
    assert splits[0] == splits[1]


def test_all_trains_on_all_and_validates_on_none():
    labels = make([2, 3])
    assert choose_split(labels, "all", 1.0, 0) == Split(tuple(labels.targets))


def test_the_fold_column_decides():
    labels = make([3, 3], ["0", "1", "7", "0", "1", "7"], "fold")
    cases = list(labels.targets)
    split = choose_split(labels, "7", 1.0, 0)
    assert split.val == (cases[2], cases[5]) and split.train == (cases[0], cases[1], cases[3], cases[4])
    assert choose_split(labels, "all", 1.0, 0).train == tuple(cases)
    with pytest.raises(UserError, match="no fold '2', needed one of 0, 1, 7 or all"):
        choose_split(labels, "2", 1.0, 0)
    one_sided = make([3, 3], ["0", "0", "0", "0", "1", "1"], "fold")
    with pytest.raises(UserError, match="no case of class a among the 2 val cases"):
        choose_split(one_sided, "1", 1.0, 0)
    with pytest.raises(UserError, match="no case of class a among the 2 train cases"):
        choose_split(one_sided, "0", 1.0, 0)


def test_the_split_column_decides():
    labels = make([3, 4], ["train", "val", "test", "train", "val", "train", "test"], "split")
    cases = list(labels.targets)
    assert choose_split(labels, None, 1.0, 0) == Split(
        (cases[0], cases[3], cases[5]), (cases[1], cases[4]), (cases[2], cases[6])
    )
    assert len(choose_split(labels, None, 0.5, 0).train) == 2
    with pytest.raises(UserError, match=r"-f 0 with a column 'split'.*leave -f out"):
        choose_split(labels, "0", 1.0, 0)
    with pytest.raises(UserError, match="holds 'dev', needed one of train, val, test"):
        choose_split(make([1, 1], ["train", "dev"], "split"), None, 1.0, 0)
    with pytest.raises(UserError, match="no case of class a, b among the 0 val cases"):
        choose_split(make([1, 1], ["train", "train"], "split"), None, 1.0, 0)


@pytest.mark.parametrize(
    ("counts", "fold", "message"),
    [
        ([6, 6], "5", r"no fold '5', needed one of 0, 1, 2, 3, 4 or all"),
        ([6, 6], "best", r"no fold 'best'"),
        ([6, 4], "0", r"class 'b' has 4 cases, needed 5, one per fold"),
    ],
)
def test_what_cannot_be_split(counts, fold, message):
    with pytest.raises(UserError, match=message):
        choose_split(make(counts), fold, 1.0, 0)


def test_a_written_split_is_read_again(tmp_path):
    split = choose_split(make([6, 7]), "2", 0.5, 0)
    split.write(tmp_path)
    assert Split.read(tmp_path) == split
    (tmp_path / "splits.json").write_text("[1]")
    with pytest.raises(UserError, match=r"splits\.json.*object.*--name"):
        Split.read(tmp_path)
