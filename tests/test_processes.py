"""Jobs in worker processes."""

import os
import signal
import subprocess
import sys
import time

SCRIPT = """
import time
from functools import partial
from nnunetv2_hiendmae.processes import in_processes

if __name__ == "__main__":
    try:
        for result in in_processes([partial(time.sleep, 0), partial(time.sleep, 60)], 2, "sleeping"):
            print("one is idle", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_workers_end_in_silence_with_ctrl_c(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen([sys.executable, str(script)], start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "one is idle\n"
        begun = time.monotonic()
        # as a terminal does it: to all of them
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=50)
    assert (out, err) == ("interrupted\n", "")
    assert time.monotonic() - begun < 30
