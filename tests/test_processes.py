"""Jobs in worker processes."""

import os
import signal
import subprocess
import sys
import time

SCRIPT = """
import sys
import time
from pathlib import Path
from nnunetv2_hiendmae.processes import in_processes

STARTED = Path(sys.argv[1])

def end_when_the_other_has_started():
    while not STARTED.exists():
        time.sleep(0.01)

def work():
    STARTED.touch()
    time.sleep(60)

if __name__ == "__main__":
    try:
        for result in in_processes([end_when_the_other_has_started, work], 2, "sleeping"):
            print("one is idle", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_workers_end_in_silence_with_ctrl_c(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    command = [sys.executable, str(script), str(tmp_path / "started")]
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "one is idle\n"
        begun = time.monotonic()
        # as a terminal does it: to all of them
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=50)
    assert (out, err) == ("interrupted\n", "")
    assert time.monotonic() - begun < 30
