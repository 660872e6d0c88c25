"""examples/few_shot.sh with stand-ins for the commands it calls: what it runs, and what it does not run again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "few_shot.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

HIENDMAE = """#!/usr/bin/env bash
echo "hiendmae $*" >>"$CALLS"
all=" $* " run=${*: -1}
case $all in
  *" pretrain "*) run=${all##* -o }; run=${run%% *}; mkdir -p "$run"; touch "$run/run.json" ;;
  # as the command does it: there is no list before something was appended, and no fold of more cases than there are
  *" --list "*) grep -q -- --shots "$CALLS" || exit 2
    echo '{"folds": [{"fold": 0}, {"fold": 1}, {"fold": 2, "kind": "shots"}]}' ;;
  *" --shots 99 "*) echo "fewer than --shots 99" >&2; exit 2 ;;
  *" --shots "*) of=${all##*--of-fold }; first=$((${of%% *} + 2)) second=
    [[ $all == *" --repeats 2 "* ]] && second=", {\\"fold\\": 1$first}"
    echo "{\\"folds\\": [{\\"fold\\": $first}$second]}" ;;
esac
"""
TRAIN = """#!/usr/bin/env bash
echo "train $*" >>"$CALLS"
fold=$nnUNet_results/Dataset007_Toy/$7__$5__3d_fullres/fold_$3
mkdir -p "$fold/validation"
touch "$fold/checkpoint_latest.pth"
[ "$5 $3" != "${BROKEN:-}" ] && touch "$fold/validation/summary.json"
"""


@pytest.fixture
def script(nnunet, tmp_path):
    """script(*arguments, **environment) → finished process and the commands that it called."""
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    stubs.mkdir()
    for name, text in (("hiendmae", HIENDMAE), ("nnUNetv2_train", TRAIN), ("nnUNetv2_preprocess", "#!/bin/sh\n")):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def run(*arguments, **environment):
        calls.write_text("")
        place = {"PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls), "METHODS": "hiendmae mim"}
        environment = {**os.environ, **place, **environment}
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60)
        return done, calls.read_text().splitlines()

    return run


def trained(calls):
    """(plans, fold, continued) of every training."""
    words = [call.split() for call in calls if call.startswith("train ")]
    return [(w[5], int(w[3]), w[-1] == "--c") for w in words]


def test_what_it_runs_and_what_it_skips(script, tmp_path):
    output = tmp_path / "out"
    done, calls = script(7, output, BROKEN="FewShot_mim 2")
    assert done.returncode == 1 and "failed: nnUNetv2_train 7 3d_fullres 2 -p FewShot_mim" in done.stderr
    plans = ["FewShot_hiendmae", "FewShot_mim", "FewShot_scratch"]
    everything = [(name, fold, False) for fold in (0, 2, 1, 3) for name in plans]
    assert trained(calls) == everything[:5]
    done, calls = script(7, output)
    assert done.returncode == 0, done.stderr
    assert trained(calls) == [("FewShot_mim", 2, True), *everything[5:]]
    assert not any("hiendmae pretrain" in call or "hiendmae plan" in call for call in calls)
    compared = f"hiendmae compare -d 7 --runs FewShot_* --baseline FewShot_scratch -o {output}/comparison"
    assert calls[-1] == compared
    done, calls = script(7, output)
    assert done.returncode == 0 and trained(calls) == [] and calls[-1] == compared


def test_results_of_other_numbers_are_not_taken_for_its_own(script, tmp_path):
    assert script(7, tmp_path / "out")[0].returncode == 0
    done, calls = script(7, tmp_path / "out", EPOCHS="11")
    assert done.returncode == 2 and "choose another OUTPUT_DIR and PLANS" in done.stderr
    assert calls == ["hiendmae env"]
    done, calls = script(7, tmp_path / "other", EPOCHS="11")
    assert done.returncode == 2 and "there are results of plans FewShot_" in done.stderr
    assert calls == ["hiendmae env"]
    done, calls = script(7, tmp_path / "other", EPOCHS="11", PLANS="Longer")
    assert done.returncode == 0 and len(trained(calls)) == 12 and "--runs Longer_*" in calls[-1]


def test_repeats_are_trained_beside_what_is_finished(script, tmp_path):
    assert script(7, tmp_path / "out", METHODS="mim")[0].returncode == 0
    done, calls = script(7, tmp_path / "out", METHODS="mim", REPEATS="2")
    assert done.returncode == 0, done.stderr
    assert [fold for _, fold, _ in trained(calls)] == [12, 12, 13, 13]


def test_folds_that_cannot_be_made_are_told_before_the_long_work(script, tmp_path):
    done, calls = script(7, tmp_path / "out", SHOTS="99")
    assert done.returncode == 2 and "fewer than --shots 99" in done.stderr
    assert [call.split()[1] for call in calls] == ["env", "splits"]


def test_usage(script):
    done, calls = script(7)
    assert done.returncode == 2 and "examples/few_shot.sh LABELLED_ID OUTPUT_DIR" in done.stderr and not calls
