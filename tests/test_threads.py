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
    """A machine of eight cores, of which some are idle, and its /proc and cgroups."""
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(8)))
    monkeypatch.setattr(threads, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "idle_cores", lambda cores: float(len(cores)))
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
    ("work", "processes", "idle", "number", "why"),
    [
        (MUCH, 1, 8.0, 8, "8.0 are idle"),
        (MUCH, 1, 7.6, 8, "7.6 are idle"),
        (MUCH, 1, 2.4, 2, "of 8 cores that may be used 2.4 are idle"),
        (MUCH, 1, 0.2, 1, "of 8 cores that may be used 0.2 are idle"),
        (3.5 * threads.WORK_PER_THREAD, 1, 8.0, 3, "steps are too small"),
        (0.0, 1, 8.0, 1, "steps are too small"),
        (MUCH, 4, 8.0, 2, "2.0 are idle"),
        (MUCH, 8, 8.0, 1, "1 core may be used"),
    ],
)
def test_a_step_gets_as_many_threads_as_are_worth_it(machine, monkeypatch, work, processes, idle, number, why):
    monkeypatch.setattr(threads, "idle_cores", lambda _: idle)
    chosen, told = threads.choose_threads(work, processes)
    assert chosen == number and why in told


def test_idle_cores_are_counted_from_what_the_system_says(machine, monkeypatch):
    """Core 0 is busy, core 1 is idle half of the time (waiting for a disk counts as idle), core 2 wholly; others of the
    system do not count, and of one that it says nothing of nobody knows that it is busy."""
    monkeypatch.undo()
    monkeypatch.setattr(threads, "_PROC", machine / "proc")
    stat = machine / "proc" / "stat"

    def say(*times):
        rows = [f"cpu{i} {user} 0 0 {idle} {waiting} 0 0 0 0 0" for i, (user, idle, waiting) in enumerate(times)]
        stat.write_text("\n".join(["cpu  9 9 9 9 9 0 0 0 0 0", *rows, "intr 1"]))

    monkeypatch.setattr(threads.time, "sleep", lambda _: say((50, 10, 0), (25, 20, 10), (5, 50, 0)))
    for cores, idle in (({0, 1}, 0.5), ({0}, 0.0), ({0, 1, 2, 9}, 2.5)):
        say((0, 10, 0), (0, 5, 0), (5, 0, 0))
        assert threads.idle_cores(cores) == idle


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
    assert line.startswith("8 threads on the CPU: as many cores may be used") and threads.CHOSEN_BY_USER in line


def test_commands_wait_passively_before_torch_is_there():
    """Unless the user says otherwise."""
    code = (
        "import os, sys; from nnunetv2_hiendmae import cli; cli.main(['env']);"
        "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'], os.environ['KMP_BLOCKTIME'])"
    )
    for own, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        plain = {k: v for k, v in os.environ.items() if k not in threads.PASSIVE}
        done = subprocess.run([sys.executable, "-c", code], env={**plain, **own}, capture_output=True, encoding="utf-8")
        assert done.stdout.splitlines()[-1] == f"False {policy} 0"
