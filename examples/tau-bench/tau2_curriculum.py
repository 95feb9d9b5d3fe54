"""Curriculum: prompts drawn by the pass rate that the run itself measures; slime's data source plug-in:

    --data-source-path tau2_curriculum.CurriculumDataSource
    --rollout-all-samples-process-path tau2_reward_shaping.process_all_samples

The second flag is the way back: at the end of a rollout it hands every finished episode to the source, dropped groups
too; what broke is left out. The source lives in one process, slime's rollout manager, and all engines get their
prompts from it. Each task's last outcomes give its pass rate p = (solved + 1) / (tries + 2), and its chance to be
drawn is proportional to 4 p (1 - p): most for what is solved half of the time, and for what has not been tried. A task
that was always or never solved is drawn with a small chance only, for the policy may have changed. No task is drawn
twice in one call; --rollout-shuffle has no meaning. Settings in the YAML of --custom-config-path:

    tau2_curriculum_tries: 8         outcomes after which "always" and "never" count
    tau2_curriculum_window: 16       outcomes of a task that are remembered, the last ones
    tau2_curriculum_revisit: 0.05    chance of an always or never solved task, where one at p = 1/2 has 1
    tau2_curriculum_start: []        runs whose outcomes are the start (see rollout_traces.py): folders of rollouts, or
                                     results of evaluate_tau2.py on the train split

The draws depend on --rollout-seed, the number of groups drawn before, and the outcomes, so a resumed run draws the
tasks that an undisturbed one would. On slime the state is SAVE/rollout/curriculum_N.json, written in one move; on one
machine it is part of the checkpoint.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tau2_errors import BadInput
from tau2_results import write_json
from tau2_settings import setting

logger = logging.getLogger(__name__)

STATE_FILE = re.compile(r"curriculum_(\d+)\.json")


def check_args(args: Any) -> None:
    """What can be told before a rollout starts; a driver that checks its command calls this. Raises BadInput."""
    if not getattr(args, "rollout_all_samples_process_path", None):
        raise BadInput(
            "the curriculum is told no outcomes: add "
            "--rollout-all-samples-process-path tau2_reward_shaping.process_all_samples"
        )
    if not args.rollout_global_dataset or args.prompt_data is None:
        raise BadInput("the curriculum needs --prompt-data and no --disable-rollout-global-dataset")
    tries, window = setting(args, "curriculum_tries"), setting(args, "curriculum_window")
    if tries > window:
        raise BadInput(f"tau2_curriculum_tries {tries} and _window {window}: tries <= window is needed")
    setting(args, "curriculum_revisit")
    for path in _starts(args):
        if not path.exists():
            raise BadInput(f"tau2_curriculum_start: {path} does not exist")


def _starts(args: Any) -> list[Path]:
    return [Path(name) for name in setting(args, "curriculum_start")]


class CurriculumDataSource:
    """slime's data source contract (get_samples, add_samples, save, load, len) over the host's own rows and samples.
    Raises BadInput."""

    def __init__(self, args: Any) -> None:
        check_args(args)
        self.args = args
        self.tries, self.window, self.revisit = (
            setting(args, f"curriculum_{name}") for name in ("tries", "window", "revisit")
        )
        self.rows = _host_source(args).dataset.origin_samples
        self.tasks = [_task_of(row.metadata) for row in self.rows]
        if not all(self.tasks):
            raise BadInput(f"{args.prompt_data}: row {self.tasks.index('')} has no metadata.task_id")
        self.sample_group_index = 0
        self.sample_index = 0
        self.outcomes: dict[str, list[int]] = {}  # of each task, 1 for solved, the newest last
        for path in _starts(args):
            self._start_from(path)

    def __len__(self) -> int:
        return len(self.rows)

    # -- drawing

    def get_samples(self, num_samples: int) -> list[list[Any]]:
        """`num_samples` groups, each of --n-samples-per-prompt samples with their own index."""
        groups = []
        while len(groups) < num_samples:
            drawn = self._draw(num_samples - len(groups))
            groups += [self._group(self.rows[place]) for place in drawn]
        return groups

    def add_samples(self, samples: list[list[Any]]) -> None:
        """Nothing is taken back: an episode cannot go on in another environment."""
        raise RuntimeError("this data source takes no samples back")

    def _draw(self, count: int) -> list[int]:
        """Places of rows of `count` different tasks, or of all: each row has its task's weight (Efraimidis and
        Spirakis 2006, algorithm A-Res), so a task that a file holds several times is likelier, and drawn once."""
        rng = random.Random(f"{self.args.rollout_seed}:{self.sample_group_index}")
        keys = [math.log(1.0 - rng.random()) / self.weight(task) for task in self.tasks]
        first: dict[str, int] = {}
        for place in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
            first.setdefault(self.tasks[place], place)
        return list(first.values())[:count]

    def weight(self, task_id: str) -> float:
        """The chance of a task to be drawn, up to a factor; 1 at the most."""
        outcomes = self.outcomes.get(task_id, [])
        solved, tries = sum(outcomes), len(outcomes)
        if tries >= self.tries and solved in (0, tries):
            return self.revisit
        rate = (solved + 1) / (tries + 2)
        return 4 * rate * (1 - rate)

    def _group(self, row: Any) -> list[Any]:
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = copy.deepcopy(row)
            sample.group_index, sample.index = self.sample_group_index, self.sample_index
            self.sample_index += 1
            group.append(sample)
        self.sample_group_index += 1
        return group

    # -- outcomes

    def record_outcomes(self, samples: Iterable[Any]) -> None:
        """Remember which of these episodes were solved. samples: those that hold an episode, in their order."""
        for sample in samples:
            solved = (sample.metadata.get("tau2") or {}).get("solved")
            self._remember(_task_of(sample.metadata), bool(solved))

    def _remember(self, task_id: str, solved: bool) -> None:
        self.outcomes[task_id] = [*self.outcomes.get(task_id, []), int(solved)][-self.window :]

    def _start_from(self, path: Path) -> None:
        from rollout_traces import read_run

        for episode in read_run(path):
            if episode.record.get("reward") is not None:
                self._remember(episode.task_id, bool(episode.record.get("solved")))

    def metrics(self) -> dict[str, int]:
        """Counts of tasks: curriculum/untried, curriculum/always_solved, curriculum/never_solved, curriculum/open."""
        counts = dict.fromkeys(("untried", "always_solved", "never_solved", "open"), 0)
        for task_id in self.tasks:
            counts[self._standing(self.outcomes.get(task_id, []))] += 1
        return {f"curriculum/{name}": count for name, count in counts.items()}

    def _standing(self, outcomes: list[int]) -> str:
        if not outcomes:
            return "untried"
        if len(outcomes) < self.tries or 0 < sum(outcomes) < len(outcomes):
            return "open"
        return "always_solved" if outcomes[0] else "never_solved"

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Where the next draw comes from; JSON-able."""
        names = ("sample_group_index", "sample_index", "outcomes")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. What another data source left tells no outcomes. Raises BadInput."""
        if problem := _problem_with(state):
            raise BadInput(f"this is no state of a curriculum: {problem}")
        self.sample_group_index, self.sample_index = state["sample_group_index"], state["sample_index"]
        self.outcomes = copy.deepcopy(state.get("outcomes", self.outcomes))

    def save(self, rollout_id: int) -> None:
        """SAVE/rollout/curriculum_N.json: the whole file, or none."""
        if not self.args.save:
            return
        path = Path(self.args.save) / "rollout" / f"curriculum_{rollout_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.state_dict())

    def load(self, rollout_id: int | None = None) -> None:
        """The state after `rollout_id`; where that is missing (a run that was ended between its checkpoint and this
        file), the newest before it. Raises BadInput for a damaged file."""
        if not self.args.load or rollout_id is None or rollout_id < 0:
            return
        folder = Path(self.args.load) / "rollout"
        numbers = sorted(int(found[1]) for file in folder.glob("*") if (found := STATE_FILE.fullmatch(file.name)))
        usable = [number for number in numbers if number <= rollout_id]
        if rollout_id not in usable:
            newest = f"continuing from curriculum_{usable[-1]}.json" if usable else "starting without outcomes"
            logger.warning("%s has no curriculum_%d.json: %s", folder, rollout_id, newest)
        if usable:
            self._load_file(folder / f"curriculum_{usable[-1]}.json")

    def _load_file(self, path: Path) -> None:
        try:
            self.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except (BadInput, OSError, ValueError, RecursionError) as error:
            raise BadInput(f"{path} is no state of a curriculum ({error!r})"[:300]) from error


def _problem_with(state: Any) -> str:
    """What is wrong with a data source's state; "" when nothing is."""
    if not isinstance(state, dict):
        return "it is no object"
    for name in ("sample_group_index", "sample_index"):
        if type(state.get(name)) is not int or state[name] < 0:
            return f"{name} is no count"
    outcomes = state.get("outcomes", {})
    lists = outcomes.values() if isinstance(outcomes, dict) else [None]
    if not all(
        isinstance(found, list) and all(type(one) is int and one in (0, 1) for one in found) for found in lists
    ):
        return "outcomes are no lists of 0 and 1"
    return ""


def _task_of(metadata: dict | None) -> str:
    return str((metadata or {}).get("task_id") or "")


def _host_source(args: Any) -> Any:
    """The data source of slime, where this is its rollout manager, else of slime_local: it reads the rows."""
    host = "slime.rollout.data_source" if "slime.ray.rollout" in sys.modules else "slime_local.data"
    return importlib.import_module(host).RolloutDataSource(args)
