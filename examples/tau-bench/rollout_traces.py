"""SFT rows from the model's own solved episodes (rejection sampling):

    python examples/tau-bench/teacher_traces.py --local_dir data --from-rollouts RUN [RUN ...] --tokenizer HF_FOLDER

A library, used by teacher_traces.py. A RUN is

- a folder with the files of slime's --save-debug-rollout-data (or a run's folder: RUN/rollouts/*.pt and slime's
  --dump-details, RUN/rollout_data/*.pt, are looked at too), or one such file. Files of evaluations (eval_*.pt) are
  passed over. They are read as plain values: no code in them runs.
- a result of evaluate_tau2.py on any split but test. Evaluation is the tool to collect episodes with:
  evaluate_tau2.py --checkpoint DIR --task-split train --num-trials 8 --temperature 1.0 --output-path collected.json

Kept are at most k episodes a task, all different dialogues: first those with the fewest agent turns, then with the
fewest characters of the agent, then in the order of the RUNs. Dropped, and counted by reason: what was not solved or
what the machinery broke, test tasks and what is near them, and solved episodes that are bad examples: with a call that
cannot be executed (also of a tool that only the customer has), or with text that could become a control token.

What is trained is what the model sampled. A turn stays in the dialogue but is not trained ("step_loss_mask": 0) where
a tool refused its call, and, with a tokenizer, where SFT's rendering of it has other ids than the model sampled
(spacing of JSON, text beside a call, a thought, another cut of the same text). Without a tokenizer, or from an
evaluation, which holds no ids, an episode with text beside a call or a thought is dropped: no row can hold that text.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai_tool_adapter import ChatTemplate
from tau2_domains import agent_tools, short_result, system_prompt
from tau2_episode import INVALID_TOOL_CALL
from tau2_errors import BadInput
from tau2_mock import training_bar
from tau2_results import read_result

FOLDERS = (".", "rollouts", "rollout_data")
ERROR = "Error:"  # how tau2's tool results begin that are errors
TELECOM = "telecom"


@dataclass
class Recorded:
    """An episode out of a file. messages: the agent's view from the greeting on. sampled: the ids of each agent turn,
    None where the file holds none."""

    record: dict[str, Any]
    domain: str
    split: str | None
    messages: list[dict]
    source: str
    sample: Any
    sampled: list[list[int]] | None = None

    @property
    def task_id(self) -> str:
        return self.record["task_id"]


@dataclass
class Traces:
    """Rows, why others were dropped, and how the rows' turns compare with what was sampled."""

    rows: list[dict] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    turns: Counter = field(default_factory=Counter)  # trained, refused (by a tool), other_ids
    exact: int = 0  # rows in which every turn has the sampled ids,
    compared: int = 0  # of those whose ids could be compared
    failed: dict[str, list[Recorded]] = field(
        default_factory=lambda: defaultdict(list)
    )  # by task, for mended_traces.py

    def add(self, row: dict, turns: Counter, compared: bool) -> None:
        if not turns["trained"]:
            self.dropped["no turn to train"] += 1
            return
        self.rows.append(row)
        self.turns += turns
        self.compared += compared
        self.exact += compared and not turns["other_ids"]


def read_traces(
    runs: list[Path],
    domain: str,
    per_task: int,
    seed: int,
    template: ChatTemplate | None,
    unusable: Callable[[list[dict]], bool],
) -> Traces:
    """The rows of `runs`; unusable: whether a dialogue holds text that must not be trained on. Raises BadInput."""
    traces = Traces()
    bar = training_bar(domain)
    usable: dict[str, list[Recorded]] = defaultdict(list)
    for episode in itertools.chain.from_iterable(map(read_run, runs)):
        reason = _why_not(episode, domain, bar, template is not None)
        if reason is None and unusable(episode.messages):
            reason = "control token in a text"
        if reason is None:
            usable[episode.task_id].append(episode)
        else:
            traces.dropped[reason] += 1
            if _failed(episode, domain) and bar(episode.task_id) is None:
                traces.failed[episode.task_id].append(episode)
    chosen = {task_id: _best(episodes, per_task, traces.dropped) for task_id, episodes in usable.items()}
    for episode in in_turns(chosen, seed):
        compared = template is not None and episode.sampled is not None
        traces.add(*make_row(episode, template if compared else None), compared)
    return traces


def in_turns(chosen: dict[str, list[Recorded]], seed: int) -> Iterator[Recorded]:
    """The first episode of every task in a seeded order, then the second of every task that has one, ..."""
    rng = random.Random(seed)
    tasks = sorted(chosen)
    for place in range(max(map(len, chosen.values()), default=0)):
        for task_id in rng.sample(tasks, len(tasks)):
            yield from chosen[task_id][place : place + 1]


def _best(episodes: list[Recorded], per_task: int, dropped: Counter) -> list[Recorded]:
    """At most `per_task` different dialogues, the shortest first; why others are none is counted in `dropped`."""
    different: dict[str, Recorded] = {}
    for episode in episodes:
        different.setdefault(_dialogue(episode), episode)
    dropped["duplicate dialogue"] += len(episodes) - len(different)
    ordered = sorted(different.values(), key=_length)
    dropped[f"over {per_task} of a task"] += max(0, len(ordered) - per_task)
    return ordered[:per_task]


def _dialogue(episode: Recorded) -> str:
    return json.dumps([episode.record.get("prompt"), episode.messages], sort_keys=True)


def _length(episode: Recorded) -> tuple[int, int]:
    turns = agent_turns(episode.messages)
    return len(turns), sum(len(json.dumps([turn.get("tool_calls"), turn["content"]])) for turn in turns)


def agent_turns(messages: list[dict]) -> list[dict]:
    """The agent's messages behind the greeting."""
    return [message for message in messages[1:] if message["role"] == "assistant"]


# ---------------------------------------------------------------------------------------------------------------------
# Which episodes are no examples


def _failed(episode: Recorded, domain: str) -> bool:
    """An episode of the domain that came to its end unsolved."""
    record = episode.record
    own = episode.domain == domain and not record.get("taught")
    return own and record.get("reward") is not None and not record.get("solved")


def _why_not(episode: Recorded, domain: str, bar: Callable[[str], str | None], has_template: bool) -> str | None:
    record = episode.record
    if record.get("reward") is None:
        return f"no episode, {record.get('end_reason', 'unknown')}"
    if episode.domain != domain:
        return "other domain"
    if record.get("taught"):
        return "played by the teacher"
    if not record.get("solved"):
        return f"not solved, {record['end_reason']}"
    return bar(episode.task_id) or _bad_example(episode, has_template)


def _bad_example(episode: Recorded, has_template: bool) -> str | None:
    record, turns = episode.record, agent_turns(episode.messages)
    if not turns:
        return "no agent turn"
    if problem := bad_calls(turns, record.get("customer_tool_calls", 0)):
        return problem
    if record.get("asides") and not (has_template and episode.sampled is not None):
        return "text beside a call, or a thought"
    if episode.sampled is not None and len(episode.sampled) != len(turns):
        return "tokens and messages differ"
    return None


def bad_calls(turns: list[dict], customer_tool_calls: int) -> str | None:
    """Why an episode with such calls in its agent's turns is no example."""
    if customer_tool_calls:
        return "call of a tool of the customer"
    names = {call["function"]["name"] for turn in turns for call in turn.get("tool_calls") or []}
    return "call that cannot be executed" if INVALID_TOOL_CALL in names else None


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def make_row(episode: Recorded, template: ChatTemplate | None) -> tuple[dict, Counter]:
    """The SFT row of a solved episode, in the form of the teacher's rows, and its turns by kind: trained, refused (by
    a tool), other_ids. With a template, the turns are compared with what was sampled."""
    record = episode.record
    greeting, *messages = (dict(message) for message in episode.messages)
    turns = _mark_untrained([greeting, *messages], episode.sampled, template)
    metadata = {
        "task_id": episode.task_id,
        "domain": episode.domain,
        "split": episode.split,
        "reward": record["reward"],
        "prompt": record["prompt"],
        "user": record["user"],
        "seed": record["seed"],
        "redraw_ids": bool(record.get("redraw_ids")),
        "source": {"rollouts": episode.source, "sample": episode.sample},
        "turns": dict(turns),
    }
    system = {"role": "system", "content": system_prompt(episode.domain, record["prompt"])}
    prompt = [system, {**greeting, "step_loss_mask": 0}, *messages]
    return {"prompt": prompt, "tools": agent_tools(episode.domain), "metadata": metadata}, turns


def _mark_untrained(
    messages: list[dict], sampled: list[list[int]] | None, template: ChatTemplate | None
) -> Counter[str]:
    """Sets "step_loss_mask": 0 on the turns that are not to be trained; how many there are of each kind."""
    kinds: Counter[str] = Counter()
    refused = refused_turns(messages)
    for number, turn in enumerate(agent_turns(messages)):
        differs = template is not None and rendered_ids(template, turn) != sampled[number]
        kind = "other_ids" if differs else "refused" if id(turn) in refused else "trained"
        kinds[kind] += 1
        if kind != "trained":
            turn["step_loss_mask"] = 0
    return kinds


def refused_turns(messages: list[dict]) -> set[int]:
    """id() of each turn one of whose calls got an error from its tool."""
    turns, last = set(), None
    for message in messages:
        if message["role"] == "assistant":
            last = message
        elif message["role"] == "tool" and str(message["content"]).startswith(ERROR):
            turns.add(id(last))
    return turns


def rendered_ids(template: ChatTemplate, turn: dict) -> list[int]:
    """Ids of an agent's turn as SFT trains them, up to the token that closes the turn."""
    before = [{"role": "user", "content": "x"}]
    render = template.tokenizer.apply_chat_template
    header = render(before, tokenize=True, add_generation_prompt=True, return_dict=False)
    ids = render([*before, turn], tokenize=True, return_dict=False)[len(header) :]
    return ids[: ids.index(template.end_id) + 1] if template.end_id in ids else ids


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_run(run: Path) -> Iterator[Recorded]:
    """The episodes of a folder of rollouts, a file of them, or a result of evaluate_tau2.py. Raises BadInput."""
    if run.suffix == ".json":
        yield from read_evaluation(run)
        return
    if not run.exists():
        raise BadInput(f"--from-rollouts {run}: does not exist")
    if run.is_file() and run.suffix != ".pt":
        raise BadInput(f"--from-rollouts {run}: give a folder of rollouts, a .pt file of them, or a result .json")
    files = rollout_files(run) if run.is_dir() else [run]
    if not files:
        raise BadInput(
            f"--from-rollouts {run}: no rollouts there; a run writes them with "
            f"--save-debug-rollout-data {run}/rollouts/{{rollout_id}}.pt"
        )
    for file in files:
        yield from read_debug_file(file)


def rollout_files(run: Path) -> list[Path]:
    """The files of training rollouts in a run's folder, in the order of their numbers."""
    files = [file for name in FOLDERS for file in (run / name).glob("*.pt") if not file.name.startswith("eval_")]
    return sorted(files, key=lambda file: (len(file.name), file.name))


def load_samples(file: Path) -> list[dict]:
    """The samples of one rollout as plain dicts, with --save-debug-rollout-data of slime and of slime_local."""
    import torch

    try:
        samples = torch.load(file, weights_only=True, map_location="cpu")["samples"]
        if not all(isinstance(sample["metadata"], dict | None) for sample in samples):
            raise ValueError("a sample's metadata is no object")
        return samples
    except Exception as error:  # the file's bytes decide what torch raises
        reason = " ".join(str(error).split())[:120]
        raise BadInput(f"{file} is no file of --save-debug-rollout-data with plain values ({reason})") from error


def read_debug_file(file: Path) -> Iterator[Recorded]:
    for sample in load_samples(file):
        metadata = sample["metadata"] or {}
        record = metadata.get("tau2") or {"reward": None}
        if sample.get("status") in ("aborted", "failed"):
            record = {**record, "reward": None}
        messages = record.get("messages") or []
        yield Recorded(
            record=record,
            domain=metadata.get("domain") or TELECOM,
            split=metadata.get("split"),
            messages=_until_last_turn(messages),
            source=str(file),
            sample=sample.get("index"),
            sampled=sampled_turns(sample),
        )


def sampled_turns(sample: dict) -> list[list[int]]:
    """The ids of each turn: the runs of 1 in the loss mask."""
    length = sample["response_length"]
    pairs = zip(sample["tokens"][len(sample["tokens"]) - length :], sample["loss_mask"] or [], strict=False)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [[token for token, _ in run] for bit, run in runs if bit]


def read_evaluation(path: Path) -> Iterator[Recorded]:
    result = read_result(path)
    if result.get("task_split") == "test":
        raise BadInput(f"--from-rollouts {path}: an evaluation on the test split; collect on train")
    try:
        for row, simulation in zip(result["results"], result["simulations"], strict=True):
            yield Recorded(
                record={**row, "redraw_ids": result.get("redraw_ids")},
                domain=result["domain"],
                split=result["task_split"],
                messages=_until_last_turn(agent_view(simulation["messages"], row["prompt"])),
                source=str(path),
                sample=[row["task_id"], row["trial"]],
            )
    except (LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: is damaged or of another version ({error!r})"[:300]) from error


def agent_view(messages: list[dict], prompt: str) -> list[dict]:
    """tau2's messages (JSON values) as the agent saw them, in OpenAI form, from the greeting on."""
    view: list[dict] = []
    names: dict[str, str] = {}
    for message in messages:
        calls = message.get("tool_calls") or []
        if message["role"] == "assistant":
            names |= {call["id"]: call["name"] for call in calls}
            view.append(_openai_turn(message, calls))
        elif message["role"] == "user" and not calls:
            view.append({"role": "user", "content": message["content"]})
        elif message["role"] == "tool" and message["requestor"] == "assistant":
            content = short_result(message["content"]) if prompt == "short" else message["content"]
            result = {"role": "tool", "tool_call_id": message["id"], "name": names.get(message["id"], "")}
            view.append({**result, "content": content})
    return view


def _openai_turn(message: dict, calls: list[dict]) -> dict:
    if not calls:
        return {"role": "assistant", "content": message["content"]}
    functions = [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": functions}


def _until_last_turn(messages: list[dict]) -> list[dict]:
    end = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return messages[: end + 1]
