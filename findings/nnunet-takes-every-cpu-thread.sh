#!/usr/bin/env bash
# `nnUNetv2_train -device cpu` and `nnUNetv2_predict -device cpu` set torch's threads to all CPUs of the machine, whatever
# OMP_NUM_THREADS, taskset or a container's limit say.
#
# Versions: nnunetv2 2.8.1, torch 2.14.1 (Python 3.11, Linux)
# Why it matters: on a shared machine, in a job of a few cores of a large node, or with several trainings side by side,
#   threads outnumber the cores that they may use, and OpenMP's spinning ones wait for each other: a tiny training of ours took
#   four times the CPU time on two busy cores. Our trainers set the number again when training starts; prediction keeps
#   nnU-Net's.
# Seen (OMP_NUM_THREADS=1, one allowed CPU, a machine said to have 64):
#   before nnU-Net: 1
#   training: 64
#   prediction: 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet nnunetv2==2.8.1 torch==2.14.1
mkdir -p "$folder/raw/Dataset001_Any" "$folder/preprocessed" "$folder/results"
export nnUNet_raw=$folder/raw nnUNet_preprocessed=$folder/preprocessed nnUNet_results=$folder/results
OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'PYTHON'
import multiprocessing
import os
import sys
from unittest import mock

import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.run import run_training

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
multiprocessing.cpu_count = lambda: 64
print("before nnU-Net:", before := torch.get_num_threads())


class Stop(Exception):
    pass


def threads_of(module, name, entry, *arguments):
    """torch's threads when the command comes to its work."""
    with mock.patch.object(module, name, side_effect=Stop), mock.patch.object(sys, "argv", ["nnUNetv2", *arguments]):
        try:
            entry()
        except Stop:
            return torch.get_num_threads()


work = ("-device", "cpu")
training = threads_of(run_training, "run_training", run_training.run_training_entry, "1", "3d_fullres", "0", *work)
print("training:", training)
torch.set_num_threads(1)
folders = ("-i", ".", "-o", os.environ["nnUNet_results"], "-d", "1", "-c", "3d_fullres", "-f", "0")
prediction = threads_of(predict_from_raw_data, "nnUNetPredictor", predict_from_raw_data.predict_entry_point, *folders, *work)
print("prediction:", prediction)
assert (before, training, prediction) == (1, 64, 64), "the behaviour has changed"
PYTHON
