"""The files of an evaluation: rows as they finish, and the result, which is also a file of tau2's own format.

A library: used by evaluate_tau2.py, tau2_compare.py, tau2_report.py and summarize.py.

OUTPUT.rows.jsonl   a line of settings, then a line an episode, on disk as soon as the episode is finished
OUTPUT.json         the numbers, `results` (an episode each), and tau2's Results: timestamp, info, tasks, simulations.
                    `tau2 view --file OUTPUT.json` and `tau2 evaluate-trajs OUTPUT.json` read it as it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atomic_file import write_atomically
from line_file import LineFile
from tau2_domains import git_commit, load_tau2, preload
from tau2_episode import EpisodeConfig
from tau2_errors import BadInput
from tau2_metrics import episode_key
from tau2_users import has_model

# Of the rows: raised when an episode's row changes its meaning, so that rows of both kinds are never mixed.
ROWS_FORMAT = 4
ROW_KINDS = {
    "task_id": str,
    "trial": int,
    "run": int,
    "minutes": int | float,
    "solved": bool,
    "reward": int | float,
    "partial_score": int | float,
    **dict.fromkeys(("issue_type", "end_reason"), str),
    **dict.fromkeys(("seed", "steps", "agent_turns", "tool_errors", "customer_tool_calls"), int),
    **dict.fromkeys(("checks", "tokens", "user", "simulation"), dict),
}
SERVER_SETTINGS = ("context_limit",)  # that only the server's answer tells
OURS = ("results", "simulations", "num_trials", "prompt", "customer", "agent")  # that a result must have


# ---------------------------------------------------------------------------------------------------------------------
# Rows, written as they finish


def rows_path(output_path: str) -> Path:
    return Path(output_path).with_suffix(".rows.jsonl")


class RowsFile:
    """OUTPUT.rows.jsonl: a line of settings, then a line per finished episode; `done`: (task_id, trial) -> row.

    Entering reads what is there and takes a lock; a torn last line counts as not written. Leaving removes a file
    without an episode. Raises BadInput for rows of other settings, for a line that is not JSON, and when another
    process holds the file.
    """

    def __init__(self, output_path: str, chosen: dict):
        self.path = rows_path(output_path)
        self.output, self.settings = Path(output_path), json.loads(json.dumps(chosen))
        self.done: dict[tuple[str, int], dict] = {}
        self.runs, self.began = 0, time.monotonic()
        self.size_without_episodes = 0

    def __enter__(self) -> RowsFile:
        if self.output.exists() and not self.path.exists():
            raise BadInput(f"{self.output} exists, without the rows to continue from: choose another --output-path")
        try:
            self.lines = LineFile(self.path)
        except BlockingIOError:
            raise BadInput(f"{self.path}: another evaluation is writing it") from None
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            self._read()
        except BaseException:
            self.lines.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.lines.size <= self.size_without_episodes:
            self.lines.remove()  # nothing of an evaluation that was refused, or broke before its first episode
        self.lines.close()

    def set_server_settings(self, answered: dict[str, Any]) -> None:
        """Adds the settings of SERVER_SETTINGS before the first row. Raises BadInput where the rows have others."""
        answered = {name: answered[name] for name in SERVER_SETTINGS if name in answered}
        if self.done:
            noted = {name: self.settings[name] for name in SERVER_SETTINGS if name in self.settings}
            self._refuse_other(noted, answered)
        elif answered:
            self.settings |= answered
            self._write_settings()

    def _read(self) -> None:
        try:
            lines = self.lines.read()
        except ValueError:
            raise BadInput(f"{self.path}: not written by this program; choose another --output-path") from None
        if len(lines) < 2:  # no episode yet that other settings could be mixed with
            if lines:
                self._parse(1, lines[0])
            self._write_settings()
            return
        for number, line in enumerate(lines, start=1):
            row = self._parse(number, line)
            if number == 1:
                self._check(row["settings"])
            else:
                self.done[episode_key(row)] = row
        self.runs = 1 + max((row["run"] for row in self.done.values()), default=-1)

    def _parse(self, number: int, line: bytes) -> dict:
        """A line as an object that has what every line needs."""
        needed = {"settings": dict} if number == 1 else ROW_KINDS
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
            raise BadInput(f"{self.path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key, ...), kind) for key, kind in needed.items()):
            raise BadInput(f"{self.path}, line {number}: not written by this program; choose another --output-path")
        return row

    def _write_settings(self) -> None:
        """Begins the file anew, without an episode."""
        self.lines.clear()
        self.lines.write({"settings": self.settings})
        self.size_without_episodes = self.lines.size

    def _check(self, there: dict) -> None:
        of_server = {key: there[key] for key in SERVER_SETTINGS if key in there}
        self._refuse_other({key: value for key, value in there.items() if key not in of_server}, self.settings)
        self.settings |= of_server

    def _refuse_other(self, there: dict, now: dict) -> None:
        other = [key for key in now | there if now.get(key) != there.get(key)]
        if other:
            differences = ", ".join(f"{key} {_told(there, key)}, now {_told(now, key)}" for key in other)
            raise BadInput(f"{self.path} was made with other settings ({differences}): choose another --output-path")

    def stamp(self) -> dict[str, Any]:
        """{"run", "minutes"} of a row that is added now: which run it is of, and how long ago that began."""
        return {"run": self.runs, "minutes": round((time.monotonic() - self.began) / 60, 3)}

    async def add(self, row: dict) -> None:
        """Returns when the row is on disk."""
        await self.lines.add(row)
        self.done[episode_key(row)] = row


def _told(settings: dict, key: str) -> str:
    """A setting as text; versions of this program differ in what they note."""
    return repr(settings[key]) if key in settings else "not noted"


# ---------------------------------------------------------------------------------------------------------------------
# The result


def tau2_results(
    rows: Sequence[dict], tasks: Sequence[Any], config: EpisodeConfig, agent: dict, num_trials: int, seed: int
) -> dict[str, Any]:
    """The keys of tau2's Results. agent: "implementation", "llm", "llm_args" of its AgentInfo.

    With re-drawn ids only the simulations: tau2 itself does not know the databases that they belong to, and would
    grade them wrongly where the other keys let it."""
    simulations = [{**row["simulation"], "trial": row["trial"]} for row in rows]
    if config.redraw_ids:
        return {"simulations": simulations}
    return {
        "timestamp": max(simulation["end_time"] for simulation in simulations),
        "info": _info(config, agent, num_trials, seed),
        "tasks": [task.model_dump(mode="json") for task in tasks],
        "simulations": simulations,
    }


def _info(config: EpisodeConfig, agent: dict[str, Any], num_trials: int, seed: int) -> dict[str, Any]:
    """`info` of tau2's Results as JSON values. agent: "implementation", "llm", "llm_args"."""
    import tau2.environment.environment as environment
    from tau2.user.user_simulator import get_global_user_sim_guidelines

    data, scripted = load_tau2().simulation, not has_model(config.user)
    policy = preload(config.domain).environment.get_policy()
    info = data.Info(
        git_commit=git_commit(Path(__file__).parent, 40) or "unknown",
        num_trials=num_trials,
        max_steps=config.max_steps,
        max_errors=config.max_errors,
        user_info=data.UserInfo(
            implementation=config.user if scripted else "user_simulator",
            llm=None if scripted else config.user,
            llm_args=(config.user_args or None) if scripted else config.user_args,
            global_simulation_guidelines=None if scripted else get_global_user_sim_guidelines(),
        ),
        agent_info=data.AgentInfo(**agent),
        environment_info=environment.EnvironmentInfo(domain_name=config.domain, policy=policy),
        seed=seed,
    )
    return info.model_dump(mode="json")


def read_result(path: str | Path) -> dict[str, Any]:
    """A result that evaluate_tau2.py wrote. Raises BadInput for anything else."""
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})"[:300]) from None
    missing = [key for key in OURS if key not in result] if isinstance(result, dict) else list(OURS)
    if missing:
        raise BadInput(f"{path}: not a result of evaluate_tau2.py (no {', '.join(missing)})")
    if not (isinstance(result["results"], list) and isinstance(result["simulations"], list)):
        raise BadInput(f"{path}: not a result of evaluate_tau2.py (results and simulations are no lists)")
    if not result["results"] or len(result["results"]) != len(result["simulations"]):
        raise BadInput(f"{path}: holds {len(result['results'])} results and {len(result['simulations'])} simulations")
    for place, (row, simulation) in enumerate(zip(result["results"], result["simulations"], strict=True)):
        if not _are_of_one_episode(row, simulation):
            raise BadInput(f"{path}: result and simulation number {place} are not of the same task and trial")
    return result


def _are_of_one_episode(row: Any, simulation: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(simulation, dict):
        return False
    return all(row.get(name) == simulation.get(name) for name in ("task_id", "trial"))


def check_output(flag: str, path: str | Path, inputs: Sequence[str | Path] = ()) -> None:
    """Raises BadInput, before any work, for a file that cannot be written, that is one of the inputs, or that is an
    evaluation's."""
    path = Path(path)
    if os.path.isdir(path):
        raise BadInput(f"{flag} {path} is a folder: give a file in it")
    if not os.path.isdir(path.parent):
        raise BadInput(f"{flag} {path}: no folder {path.parent}")
    for given in inputs:
        if os.path.realpath(given) == os.path.realpath(path):
            raise BadInput(f"{flag} {path} would overwrite what is read: give another file")
    if path.exists() and (rows_path(str(path)).exists() or _is_result(path)):
        raise BadInput(f"{flag} {path} holds the result of an evaluation: give another file, or remove it")


def _is_result(path: Path) -> bool:
    try:
        read_result(path)
    except BadInput:
        return False
    return True


def write_json(path: Path, value: dict) -> None:
    """Writes the whole object or nothing, a line a key, for indentation takes ten times as long. Raises OSError."""
    lines = [f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    write_atomically(path, ["{\n", ",\n".join(lines), "\n}\n"])
