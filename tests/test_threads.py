"""Threads of CPU runs: which cores count, how many threads a step is worth, and that a user's own number wins."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from nnunetv2_hiendmae import threads

MUCH = 100 * threads.WORK_PER_THREAD


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of eight cores, its /proc and cgroups."""
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(8)))
    monkeypatch.setattr(threads, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.delenv(threads.CHOSEN_BY_USER, raising=False)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("cgroup", "limits", "cores"),
    [
        ("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "50000 100000\n"}, 1),
        # a container that sees its own group as the root
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("2:memory:/x\n1:name=systemd:/\n", {"x/cpu.max": "100000 100000"}, 8),
        (None, {}, 8),
    ],
)
def test_cores_are_those_of_affinity_and_cgroups(machine, cgroup, limits, cores):
    if cgroup is not None:
        (machine / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in limits.items():
        path = machine / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert threads.available_cores() == cores


@pytest.mark.parametrize(
    ("work", "processes", "number", "why"),
    [
        (MUCH, 1, 8, "8 cores may be used"),
        (3.5 * threads.WORK_PER_THREAD, 1, 3, "steps are too small for more, 8 cores may be used"),
        (0.0, 1, 1, "steps are too small for more, 8 cores may be used"),
        (MUCH, 4, 2, "2 cores may be used"),
        (MUCH, 8, 1, "1 core may be used"),
    ],
)
def test_a_step_gets_as_many_threads_as_are_worth_it(machine, work, processes, number, why):
    assert threads.choose_threads(work, processes) == (number, why)


def test_a_users_own_number_wins(machine, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv(threads.CHOSEN_BY_USER, "3")
    threads.use_threads(MUCH)
    assert not asked and not caplog.records
    monkeypatch.delenv(threads.CHOSEN_BY_USER)
    threads.use_threads(MUCH)
    threads.use_threads(MUCH, processes=4, tell=False)
    assert asked == [8, 2]
    [line] = [record.message for record in caplog.records]
    assert line.startswith("8 threads on the CPU: 8 cores may be used") and threads.CHOSEN_BY_USER in line


@pytest.mark.parametrize(("own", "number"), [(None, 8), ("3", 3), ("2,4", 2), ("0", 8), ("many", 8)])
def test_trainers_take_the_cores_that_they_may_use(machine, monkeypatch, own, number):
    """nnU-Net's command has set all cores of the machine before."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    if own:
        monkeypatch.setenv(threads.CHOSEN_BY_USER, own)
    threads.use_allowed_cores()
    assert asked == [number]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({}, "PASSIVE 1000 0"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7 0"),
        # a number of turns would undo it
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None None"),
    ],
)
def test_commands_wait_passively_before_torch_is_there(own, said):
    """Unless the user says otherwise."""
    code = (
        "import os, sys; from nnunetv2_hiendmae import cli, threads; cli.main(['env']);"
        "print('torch' in sys.modules, *map(os.environ.get, threads.PASSIVE))"
    )
    plain = {k: v for k, v in os.environ.items() if k not in threads.PASSIVE}
    done = subprocess.run([sys.executable, "-c", code], env={**plain, **own}, capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == f"False {said}"
