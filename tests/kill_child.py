"""Runs the stages' main() in children that can be killed at any moment; used by tests/test_kill.py.

Reads a JSON line {"stage", "argv", "folder"} from stdin, forks, and writes "pid N", then "end STATUS". Everything is
imported once, before the first fork, so that a kill hits the stage's own work and not the imports.
"""

import json
import os
import sys

import evaluate_tau2
import tau2_mock
import teacher_traces
import train
from slime_local import loop, rollout, server  # noqa: F401  what the stages import when they run
from tau2_domains import load_tasks

MAINS = {
    "tasks": tau2_mock.main,
    "traces": teacher_traces.main,
    "sft": train.main,
    "grpo": train.main,
    "evaluation": evaluate_tau2.main,
}


def run(command: dict) -> None:
    """In the child: never returns."""
    code = 70
    try:
        os.chdir(command["folder"])
        with open("log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = MAINS[command["stage"]](command["argv"])
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    load_tasks("telecom", "test")
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(f"pid {pid}", flush=True)
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        print(f"end {end.si_status if end.si_code == os.CLD_EXITED else -end.si_status}", flush=True)
        sys.stdin.readline()  # until then the number is not free for another process: it may be about to be killed
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
