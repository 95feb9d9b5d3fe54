"""Stage 1: tau2-bench's tasks as JSONL prompt files for slime.

    python examples/tau-bench/tau2_mock.py --local_dir data

writes telecom_train_tasks.jsonl (74 rows) and telecom_test_tasks.jsonl (40 rows), the same bytes every time. A row is

    {"index": 0, "metadata": {"domain": "telecom", "split": "train", "task_id": "[mms_issue]...", "task": {...}}}

where `index` counts the rows of its file in tau2's own order and `task` is the whole tau2 task.

    python examples/tau-bench/tau2_mock.py --local_dir data --splits train --mix mms_issue=1 --num-rows 72 --seed 1

writes telecom_train_mix_tasks.jsonl, in which the kinds of tasks take turns: 14 of the 74 train tasks are service
tasks, so most batches of four prompts hold none or one, and a GRPO step on them forgets what it does not see. Without
--rollout-shuffle each batch has its share of every kind. Tasks come back once all of their kind were drawn.

`--domain` and `--splits` give other domains and splits, `--splits pool` the training pool: telecom's `full` tasks that
are not in `base` (the official train and test tasks) and are no near-duplicates of a test task. Retail and airline
have no tasks outside `base`, hence no pool.

What near means. A telecom task is an issue type and a set of faults to repair, drawn from fourteen (no two of the
2285 tasks have the same set). Variants of one fault (which of the two roaming switches is off, which app permission
is missing, why the line is suspended) count as one fault with a value. The distance of two tasks of one issue type is
the number of faults that only one of them has or that both have with different values; the persona is ignored. Tasks
nearer than `--min-distance` (2) to any test task are left out: those that differ from it in a single fault. Of the
2171 tasks outside `base`, 1908 remain (1751 mms_issue, 155 mobile_data_issue, 2 service_issue); 1025 at distance 3.
The official split is no stricter: 27 of the 74 train tasks, 13 of its 14 service ones, are within 1 of a test task.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from atomic_file import write_atomically
from tau2_domains import SPLIT_FOLDERS, is_telecom, issue_type, load_split_ids, load_tasks, task_type, tasks_by_id
from tau2_errors import BadInput
from tau2_metrics import sub_issues
from tau2_parser import ArgumentParser

MOST = 1_000_000  # what is counted on the command line
POOL = "pool"
POOL_DOMAIN = "telecom"
MIN_DISTANCE = 2  # faults, of the pool from every test task
# Why no row of a task is to be trained on.
TEST_TASK, NEAR_TEST_TASK, UNKNOWN_TASK = "test task", "near a test task", "unknown task"
TASK_ID = re.compile(r"\[(?P<type>\w+)\](?P<faults>.+)\[PERSONA:\w+\]")
# Sub-issues that are values of one and the same fault.
VARIANTS = {
    re.compile(r"user_abroad_roaming_\w+"): "roaming",
    re.compile(r"break_app_\w+_permissions?"): "app_permission",
    re.compile(r"\w+_suspension"): "suspension",
}


def parse_faults(task_id: str) -> dict[str, str]:
    """{fault: variant} of a telecom task, from its id. Raises ValueError when the id has another form."""
    match = TASK_ID.fullmatch(task_id)
    if match is None:
        raise ValueError(f"not the id of a telecom task: {task_id!r}")
    return {_fault(sub_issue): sub_issue for sub_issue in match["faults"].split("|")}


def _fault(sub_issue: str) -> str:
    return next((fault for pattern, fault in VARIANTS.items() if pattern.fullmatch(sub_issue)), sub_issue)


def fault_distance(a: dict[str, str], b: dict[str, str]) -> int:
    """Number of faults that only one of the two has, or that they have in different variants."""
    return sum(a.get(fault) != b.get(fault) for fault in a.keys() | b.keys())


def far_from_tests(min_distance: int = MIN_DISTANCE) -> Callable[[str], bool]:
    """Says of a telecom task's id whether it is `min_distance` away from every test task of its issue type."""
    tests = [(issue_type(task_id), parse_faults(task_id)) for task_id in load_split_ids(POOL_DOMAIN)["test"]]

    def is_far(task_id: str) -> bool:
        kind, faults = issue_type(task_id), parse_faults(task_id)
        return all(kind != other or fault_distance(faults, theirs) >= min_distance for other, theirs in tests)

    return is_far


def training_bar(domain: str) -> Callable[[str], str | None]:
    """Says of a task's id why no row of it may be trained on, or None: it is one of the domain's test tasks, or,
    outside the official train split, near to one, or no task of the domain. The one rule for every source of rows."""
    splits = load_split_ids(domain)
    test, train, known = (set(splits[split]) for split in ("test", "train", "full"))
    is_far = far_from_tests() if SPLIT_FOLDERS[domain] == POOL_DOMAIN else lambda task_id: True

    def why(task_id: str) -> str | None:
        if task_id in test:
            return TEST_TASK
        if task_id in train:
            return None
        if TASK_ID.fullmatch(task_id) and not is_far(task_id):
            return NEAR_TEST_TASK
        return None if task_id in known else UNKNOWN_TASK

    return why


def load_pool(min_distance: int = MIN_DISTANCE) -> list[Any]:
    """Telecom tasks outside `base` that are `far_from_tests`."""
    base, is_far = set(load_split_ids(POOL_DOMAIN)["base"]), far_from_tests(min_distance)
    return [task for task in load_tasks(POOL_DOMAIN, "full") if task.id not in base and is_far(task.id)]


def make_rows(domain: str, split: str, tasks: Iterable[Any]) -> list[dict]:
    """The rows of one file; see the module's docstring."""
    return [
        {
            "index": index,
            "metadata": {"domain": domain, "split": split, "task_id": task.id, "task": task.model_dump(mode="json")},
        }
        for index, task in enumerate(tasks)
    ]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Writes one JSON object a line, all or nothing. Raises BadInput when the file cannot be written, or when another
    process is writing it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except BlockingIOError as error:
        raise BadInput(f"{path}: another process is writing it; wait for it or choose another file") from error
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error


def check_folder(folder: Path) -> None:
    """Raises BadInput when files cannot be made in `folder`, which need not exist yet. Creates nothing."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise BadInput(f"{str(folder)[:80]} cannot be a folder: {error.strerror}") from error
    if not nearest.is_dir():
        raise BadInput(f"{nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"no permission to write in {nearest}")


def try_folder(folder: Path) -> None:
    """Makes it and a passing file in it: permissions do not tell of every file system. Raises BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"cannot write in {folder}: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Raises BadInput when no file can be written at `path`, whose folder need not exist yet. Creates nothing."""
    check_folder(path.parent)
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder: give a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise BadInput(f"no permission to write {path}")
    except OSError as error:
        raise BadInput(f"{str(path)[:80]} cannot be a file: {error.strerror}") from error


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSONL file. Raises BadInput when it is missing or empty or has a broken line (its number)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    rows = [_parse_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BadInput(f"{path} is empty")
    return rows


def _parse_line(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{path}, line {number} holds half of a surrogate pair: it is no text") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{path}, line {number} is not a JSON object")
    return row


def read_task_rows(path: Path) -> list[dict]:
    """The `metadata` of each row of a file that this script wrote. Raises BadInput, with the line if there is one."""
    if not path.exists():
        raise BadInput(f"{path} does not exist; make it with: python {__file__} --local_dir {path.parent}")
    rows = [row.get("metadata") for row in read_jsonl(path)]
    for number, metadata in enumerate(rows, 1):
        if (
            not isinstance(metadata, dict)
            or not isinstance(metadata.get("task"), dict)
            or not isinstance(metadata["task"].get("id"), str)
        ):
            raise BadInput(f"{path}, row {number} holds no task under metadata.task: is it a file of tau2_mock.py?")
    return rows


def draw_tasks(rows: list[dict], count: int, mix: dict[str, int] | None, seed: int) -> list[dict]:
    """`count` rows, of tasks or of dialogues, in a seeded order that uses every row once before any twice.

    With a `mix` of weights, kinds of tasks take turns so often, however many tasks each has (an issue type that it
    does not name: once). Raises BadInput when no task is of a kind that it names."""
    rng = random.Random(seed)
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault("all" if mix is None else _kind(_task_id(row), mix), []).append(row)
    if missing := [kind for kind in mix or {} if kind not in groups]:
        raise BadInput(f"--mix: {_why_missing(missing[0], {_task_id(row) for row in rows}, mix)}")
    decks = {kind: _deal(groups[kind], rng) for kind in sorted(groups)}
    weights = {kind: (mix or {}).get(kind, 1) for kind in decks}
    turns = [kind for turn in range(max(weights.values())) for kind in decks if turn < weights[kind]]
    return [next(decks[kind]) for kind in itertools.islice(itertools.cycle(turns), count)]


def _task_id(row: dict) -> str:
    return row["task"]["id"] if "task" in row else row["metadata"]["task_id"]


def _kind(task_id: str, mix: dict[str, int]) -> str:
    """The first sub-issue of the mix that the task has, or else its issue type."""
    found = sub_issues(task_id)
    return next((name for name in mix if name in found), issue_type(task_id))


def _why_missing(kind: str, ids: set[str], mix: dict[str, int]) -> str:
    """Why no task counts for a kind of the mix."""
    kinds = {task_id: {issue_type(task_id), *sub_issues(task_id)} for task_id in ids}
    takers = sorted({_kind(task_id, mix) for task_id in ids if kind in kinds[task_id]})
    if takers:
        return f"every task of the kind {kind!r} counts for {' or '.join(takers)} already: leave {kind} out"
    return f"no task is of the kind {kind!r}; they are: {', '.join(sorted(set().union(*kinds.values())))}"


def _deal(rows: list[dict], rng: random.Random) -> Iterator[dict]:
    while True:
        yield from rng.sample(rows, len(rows))


def mix_rows(rows: list[dict], args: argparse.Namespace) -> list[dict]:
    """Rows drawn with `--mix`, counted anew."""
    drawn = draw_tasks(rows, args.num_rows or len(rows), args.mix, args.seed)
    return [row | {"index": index} for index, row in enumerate(drawn)]


def tasks_of(domain: str, split: str, min_distance: int) -> list[Any]:
    """The tasks of an official split or of the pool. Raises BadInput on an unknown domain or split."""
    if split != POOL:
        return load_tasks(domain, split)
    if domain != POOL_DOMAIN:
        raise BadInput(no_pool(domain))
    if not (pool := load_pool(min_distance)):
        raise BadInput(f"no task is {min_distance} faults away from every test task: lower --min-distance")
    return pool


def no_pool(domain: str) -> str:
    """Why there is none."""
    return (
        f"the split 'pool' exists for the domain {POOL_DOMAIN!r} only: {domain!r} has no tasks outside its base split"
    )


def check_splits(domain: str, splits: list[str]) -> None:
    """Raises BadInput on an unknown domain or split, before anything is written."""
    if POOL in splits and domain in SPLIT_FOLDERS and domain != POOL_DOMAIN:  # told before tau2 loads
        raise BadInput(no_pool(domain))
    valid = [*load_split_ids(domain), *([POOL] if domain == POOL_DOMAIN else [])]
    unknown = [split for split in splits if split not in valid]
    if unknown:
        raise BadInput(f"unknown split {unknown[0]!r} of domain {domain!r}; choose from: {', '.join(valid)}")


def mix_weights(text: str) -> dict[str, int]:
    """{"mms_issue": 3} of "mms_issue=3"."""
    weights: dict[str, int] = {}
    for part in text.split(","):
        kind, equals, number = (word.strip() for word in part.partition("="))
        if not (kind and equals and number):
            raise argparse.ArgumentTypeError(f"{part[:40]!r}: give KIND=N,...")
        if kind in weights:
            raise argparse.ArgumentTypeError(f"{kind[:40]!r} is named twice")
        weights[kind] = positive(number)
    return weights


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no whole number from 1 to {MOST:,}")
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description="Write tau2-bench's tasks as JSONL prompt files for slime.")
    parser.add_argument("--local_dir", "--local-dir", type=Path, required=True, help="folder that the files go to")
    parser.add_argument("--domain", default=POOL_DOMAIN, help="tau2 domain (default: telecom)")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], help="tau2 splits, or pool (telecom only)")
    parser.add_argument(
        "--min-distance",
        type=int,
        help=f"pool: least distance from test tasks (default: {MIN_DISTANCE})",
    )
    parser.add_argument(
        "--mix",
        type=mix_weights,
        metavar="KIND=N,...",
        help="write DOMAIN_SPLIT_mix_tasks.jsonl, where issue types, or tasks with a sub-issue, take turns by weights "
        "(a type that is not named: 1)",
    )
    parser.add_argument("--num-rows", type=positive, help="of such a file (default: as many as the split has tasks)")
    parser.add_argument("--seed", type=int, help="of the draws in such a file (default: 0)")
    args = parser.parse_args(argv)
    if args.mix is None and (args.num_rows or args.seed is not None):
        parser.error(f"--{'num-rows' if args.num_rows else 'seed'} belongs to --mix")
    if args.min_distance is not None and args.min_distance < 1:
        parser.error("--min-distance must be at least 1")
    if args.min_distance is not None and POOL not in args.splits:
        parser.error("--min-distance belongs to --splits pool")
    args.seed = args.seed or 0
    args.min_distance = args.min_distance or MIN_DISTANCE
    return args


def make_files(args: argparse.Namespace) -> dict[Path, list[dict]]:
    """The rows of every file. Raises BadInput."""
    check_folder(args.local_dir)
    check_splits(args.domain, args.splits)
    if args.mix is not None and not is_telecom(args.domain):
        raise BadInput("--mix draws telecom's issue types only")
    try_folder(args.local_dir)
    files = {}
    for split in args.splits:
        rows, name = make_rows(args.domain, split, tasks_of(args.domain, split, args.min_distance)), split
        if args.mix is not None:
            rows, name = mix_rows(rows, args), f"{split}_mix"
        files[args.local_dir / f"{args.domain}_{name}_tasks.jsonl"] = rows
    return files


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        for path, rows in make_files(args).items():
            write_jsonl(path, rows)
            kinds = Counter(task_type(tasks_by_id(args.domain)[_task_id(row)], args.domain) for row in rows)
            print(f"{path}: {len(rows)} tasks ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
