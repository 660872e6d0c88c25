"""`--part K/N`: several processes on disjoint cases of one dataset."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from nnunet_data import make_dataset

from nnunetv2_hiendmae.errors import UserError
from nnunetv2_hiendmae.options.commands import PreprocessOptions
from nnunetv2_hiendmae.preprocessing.preprocess import PreprocessSummary, preprocess_datasets

PLANS = "HiEndMAEPretrain"


def run(part=None, **settings):
    return preprocess_datasets([1], **{"spacing_mm": (3, 3, 3), "num_processes": 1, "part": part, **settings})


def folder(nnunet, name, plans=PLANS):
    return nnunet.preprocessed / name / f"{plans}_3d_fullres"


def content(nnunet, name, plans=PLANS):
    return {p.name: p.read_bytes() for p in sorted(folder(nnunet, name, plans).iterdir())}


def test_parts_are_disjoint_and_together_they_are_the_whole(nnunet):
    name = make_dataset(nnunet, 1, cases=5, with_labels=False)
    done = []
    for part, cases in (("1/3", 2), ("2/3", 2), ("3/3", 1)):
        assert run(part) == PreprocessSummary(cases, 0, ())
        done.append({p.stem for p in folder(nnunet, name).glob("case_???.b2nd")})
    assert [len(d) for d in done] == [2, 4, 5]
    assert run() == PreprocessSummary(0, 5, ())
    run(plans_name="Whole")
    assert content(nnunet, name) == content(nnunet, name, "Whole")
    assert not list(nnunet.preprocessed.rglob("*.partial"))


def test_more_parts_than_cases(nnunet):
    make_dataset(nnunet, 1, cases=2, with_labels=False)
    assert run("3/4") == PreprocessSummary(0, 0, ())


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "1/", "a/b", "1/0", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(part):
    with pytest.raises(UserError, match=f"--part is {re.escape(part)}, needed"):
        PreprocessOptions(part=part)


def test_whole_and_parts_refuse_each_other(nnunet, monkeypatch):
    monkeypatch.setattr("nnunetv2_hiendmae.preprocessing.preprocess._LOOK_S", 0)
    name = make_dataset(nnunet, 1, cases=2, with_labels=False)
    place = nnunet.preprocessed / name
    place.mkdir()
    for part in (None, "1/2"):
        with FileLock(place / f".{PLANS}.lock"), pytest.raises(UserError, match=f"another process .*{name} .*{PLANS}"):
            run(part)
    with FileLock(place / f".{PLANS}.part-1-of-2.lock"):
        with pytest.raises(UserError, match=f"another process .*{name}"):
            run()
        with pytest.raises(UserError, match=f"another process .*part 1/2 of {name}"):
            run("1/2")
        assert run("2/2").done == 1
    assert run() == PreprocessSummary(1, 1, ())


def test_a_broken_case_is_named_by_the_part_that_has_it(nnunet):
    name = make_dataset(nnunet, 1, cases=3, with_labels=False)
    file = nnunet.raw / name / "imagesTr" / "case_001_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    assert run("1/2") == PreprocessSummary(2, 0, ())
    summary = run("2/2")
    assert summary.done == 0 and [case for _, case, _ in summary.broken] == ["case_001"]


COMMAND = [sys.executable, "-m", "nnunetv2_hiendmae.cli"]
COMMAND += ["preprocess", "-d", "1", "-np", "1", "--spacing", "3", "3", "3"]


@pytest.mark.slow
def test_parts_at_the_same_time_one_of_them_killed(nnunet):
    """The first makes fingerprint and plans, the other one waits; killed anywhere, a rerun ends with the same bytes."""
    name = make_dataset(nnunet, 1, cases=12, shape=(64, 64, 64), with_labels=False)
    parts = [subprocess.Popen([*COMMAND, "--part", f"{k}/2"], env={**os.environ}) for k in (1, 2)]
    deadline = time.time() + 240
    while not list(folder(nnunet, name).glob("*.b2nd")) and time.time() < deadline:
        time.sleep(0.02)
    parts[0].send_signal(signal.SIGKILL)
    assert parts[1].wait() == 0 and parts[0].wait() == -signal.SIGKILL
    assert run("1/2").broken == () and run() == PreprocessSummary(0, 12, ())
    run(plans_name="Whole")
    assert content(nnunet, name) == content(nnunet, name, "Whole")
    assert not list(nnunet.preprocessed.rglob("*.partial"))
    assert json.loads((nnunet.preprocessed / name / f"{PLANS}.json").read_text())["plans_name"] == PLANS
