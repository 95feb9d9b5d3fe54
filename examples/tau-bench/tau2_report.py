"""One HTML file about one evaluation, or several side by side: numbers, charts, and every episode to read.

    python examples/tau-bench/tau2_report.py sft.json --output report.html
    python examples/tau-bench/tau2_report.py base.json sft.json grpo.json --labels base sft grpo \\
        --metrics-log runs/local/sft/metrics.jsonl runs/local/grpo/metrics.jsonl --output report.html

The inputs are what evaluate_tau2.py wrote. The file needs nothing beside it and no network. Transcripts are written by
models, so nothing in them is trusted: the template escapes, the episodes travel as data that only `textContent` shows,
and the page's Content-Security-Policy lets no other script or style run than the two of report/.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import itertools
import json
import math
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import tau2_charts as charts
from atomic_file import write_atomically
from tau2_compare import NAMES, compare, p_value
from tau2_errors import BadInput
from tau2_parser import ArgumentParser
from tau2_results import check_output

FOLDER = Path(__file__).parent / "report"
BLOCK = 48  # episodes that are packed, and unpacked by the reader, together
# Of the main curves of a run: title, {key of metrics.jsonl: name in the chart}, bounds of the axis.
CURVES = (
    ("Reward", {"rollout/raw_reward": "tau2's reward", "rollout/shaped_reward": "with partial credit"}, None),
    ("Partial score", {"rollout/partial_score": "partial score"}, [0, 1]),
    ("Share of episodes solved", {"rollout/pass_rate": "rollouts"}, [0, 1]),
    ("Loss", {"train/loss": "loss"}, None),
    ("KL", {"train/kl_loss": "to the reference", "train/ppo_kl": "to the old policy"}, None),
    ("Log-prob gap, engine and trainer", {"train/train_rollout_logprob_abs_diff": "mean absolute difference"}, None),
    ("Gradient norm", {"train/grad_norm": "gradient norm"}, None),
)
END_REASON_KEY = "rollout/stop/"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT.json", help="what evaluate_tau2.py wrote")
    add("--labels", nargs="+", help="a name per result (default: the file's, without eval_)")
    add("--metrics-log", nargs="+", type=Path, default=[], help="metrics.jsonl of training runs")
    add("--output", type=Path, required=True, help="the HTML file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        check_html(args.output, [*args.results, *args.metrics_log])
        runs = read_runs(args.results, args.labels)
        logs = [read_log(path) for path in args.metrics_log]
        write(args.output, render(runs, logs, comparison(runs)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {sum(len(run.rows) for run in runs)} episodes")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What is read


class Loose(BaseModel):
    """Checked where a key is there; keys that the report does not know are left out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Interval(Loose):
    value: float
    low: float | None = None
    high: float | None = None


class Group(Loose):
    total: int
    tasks: int | None = None
    successes: int
    pass_at_1: float
    avg_partial_score: float | None = None
    low: float | None = None
    high: float | None = None


class Metrics(Loose):
    confidence: float = 0.95
    pass_at_1: Interval | None = None
    avg_reward: Interval | None = None
    avg_partial_score: Interval | None = None
    pass_at_k: dict[str, Interval | None] = {}
    pass_hat_k: dict[str, Interval | None] = {}


class Row(Loose):
    task_id: str
    solved: bool
    end_reason: str
    trial: int = 0
    issue_type: str = "other"
    reward: float
    partial_score: float
    checks: dict[str, Any] | None = None
    detail: str | None = None
    seed: Any = None
    steps: int | None = None
    agent_turns: int | None = None
    tool_errors: int | None = None
    customer_tool_calls: int | None = None
    tokens: dict[str, Any] = {}


class ToolCall(Loose):
    id: str = ""
    name: str
    arguments: Any = None


class Message(Loose):
    role: str
    id: str = ""
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    requestor: str | None = None
    error: bool = False


class Simulation(Loose):
    task_id: str
    trial: int | None = None
    messages: list[Message] = []
    reward_info: dict[str, Any] | None = None


class Result(Loose):
    """OUTPUT.json of the evaluation, as far as the report shows it."""

    results: list[Row] = Field(min_length=1)
    pass_at_1: float
    avg_reward: float | None = None
    avg_partial_score: float | None = None
    metrics: Metrics = Metrics()
    by_issue_type: dict[str, Group] = {}
    by_sub_issues: dict[str, Group] = {}
    by_persona: dict[str, Group] = {}
    by_changes: dict[str, Group] = {}
    floor_always_transfer: float | None = None
    customer: dict[str, Any] = {}
    prompt: Any = None
    agent: Any = None
    agent_llm: Any = None
    checkpoint: Any = None
    domain: Any = None
    task_split: Any = None
    seed: Any = None
    seeds: list[Any] = []
    settings: dict[str, Any] = {}
    num_trials: int = 1
    temperature: Any = None
    max_steps: Any = None
    max_turn_tokens: Any = None
    redraw_ids: bool = False
    tokens: dict[str, Any] = {}
    minutes: Any = None
    timestamp: str | None = None
    versions: dict[str, Any] = {}
    tasks: list[dict[str, Any]] = []
    simulations: list[Simulation] = []

    @classmethod
    def read(cls, path: Path) -> Result:
        """Raises BadInput, in one line, for a file that is not what evaluate_tau2.py writes."""
        try:
            return cls.model_validate_json(plain_json(read_text(path)))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path} is no result of evaluate_tau2.py ({_first_problem(error)})") from None


@dataclass
class Run:
    label: str
    result: Result

    @property
    def rows(self) -> list[Row]:
        return self.result.results


def read_runs(paths: list[Path], labels: list[str] | None) -> list[Run]:
    labels = [as_utf8(label) for label in labels or [path.stem.removeprefix("eval_") for path in paths]]
    if len(labels) != len(paths):
        raise BadInput(f"--labels: {len(labels)} names for {len(paths)} results")
    if len(set(labels)) < len(labels):
        raise BadInput(f"two results are called {Counter(labels).most_common(1)[0][0]!r}: give --labels")
    return [Run(label, Result.read(path)) for path, label in zip(paths, labels, strict=True)]


def plain_json(text: str) -> bytes:
    """The same JSON, strict: NaN becomes a string, a lone surrogate a question mark."""
    value = json.loads(text, parse_constant=str)
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def as_utf8(text: str) -> str:
    """A name from the file system or the command line, where any bytes may stand."""
    return text.encode("utf-8", "replace").decode()


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"not JSON: {error}" if isinstance(error, ValueError) else "nested too deeply"
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"


def read_log(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """(name of the folder, rows) of a metrics.jsonl; a last line that a running training has not finished is left."""
    *lines, _ = read_text(path).split("\n")
    try:
        found = [json.loads(plain_json(line)) for line in lines]
    except ValueError as error:
        raise BadInput(f"{path} is no metrics.jsonl ({error})") from None
    if not found or not all(isinstance(row, dict) for row in found):
        raise BadInput(f"{path} is no metrics.jsonl: it has no lines of metrics")
    return as_utf8(path.resolve().parent.name), found


# ---------------------------------------------------------------------------------------------------------------------
# The page


def render(runs: list[Run], logs: list[tuple[str, list[dict]]], compared: dict[str, Any] | None = None) -> str:
    """The HTML. compared: what `comparison` gives, or None for no such section."""
    css, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    tasks, episodes, blocks = pack_episodes(runs)
    index = {"runs": [run.label for run in runs], "tasks": tasks, "episodes": episodes}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decimals": decimals, "interval": interval, "p_value": p_value}
    return environment.get_template("report.html.jinja").render(
        css=Markup(css),
        script=Markup(script),
        csp=content_security_policy(css, script),
        title=" · ".join(run.label for run in runs),
        runs=runs,
        confidence=max(run.result.metrics.confidence for run in runs),
        headline=headline(runs),
        conditions=conditions(runs),
        summary=" · ".join(in_short(runs)),
        overall=list(filter(None, [overall_figure(runs), trials_figure(runs)])),
        figures=result_figures(runs),
        training=[training_section(runs, name, rows) for name, rows in logs],
        comparison=compared,
        quantities=NAMES,
        better=lambda pair: [flip for flip in pair["flips"] if flip["b"] > flip["a"]],
        worse=lambda pair: [flip for flip in pair["flips"] if flip["b"] < flip["a"]],
        links={
            (run.label, row.task_id): episode_id(run.label, row) for run in reversed(runs) for row in run.rows[::-1]
        },
        choices=choices(runs),
        index=Markup(json_island(index)),
        blocks=blocks,
    )


def content_security_policy(css: str, script: str) -> str:
    """Nothing but our own style and script, known by their hashes; no connection, image, frame or form at all."""
    style_hash, script_hash = (_sha256(text) for text in (css, script))
    rules = {"default-src": "'none'", "style-src": style_hash, "script-src": script_hash}
    rules |= {"base-uri": "'none'", "form-action": "'none'"}
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def json_island(value: Any) -> str:
    """JSON that cannot end its <script> element. Pure ASCII: U+2028 and the like are escaped too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def check_html(path: Path, inputs: Sequence[Path]) -> None:
    """Raises BadInput, before any work, where the report would take the place of something else."""
    check_output("--output", path, inputs)
    if path.suffix in (".json", ".jsonl"):
        raise BadInput(f"--output {path}: the report is HTML: give a name that ends in .html")


def write(path: Path, text: str) -> None:
    """Writes the whole page or nothing. Raises BadInput when it cannot be written."""
    try:
        write_atomically(path, [text])
    except OSError as error:
        raise BadInput(f"--output {path} cannot be written ({error.strerror})") from None


def decimals(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.3f}".replace("-", "−")


def interval(found: Interval | dict, signed: bool = False) -> str:
    """ "0.801 to 0.968", or nothing where the input has no interval."""
    low, high = (found[key] if isinstance(found, dict) else getattr(found, key) for key in ("low", "high"))
    return "" if low is None or high is None else f"{decimals(low, signed)} to {decimals(high, signed)}"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def headline(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows of the first table: {"name", "note", "cells": one Interval or None per run}."""
    lines = [("pass@1", "share of episodes solved", [_pass_at_1(run) for run in runs])]
    ks = sorted({int(k) for run in runs for k in run.result.metrics.pass_hat_k if k.isdigit()} - {1})
    for k in map(str, ks):
        lines.append(
            (f"pass^{k}", f"all of {k} trials solved", [run.result.metrics.pass_hat_k.get(k) for run in runs])
        )
    for k in map(str, ks):
        lines.append((f"pass@{k}", f"at least one of {k}", [run.result.metrics.pass_at_k.get(k) for run in runs]))
    for key, name, note in (
        ("avg_partial_score", "partial score", "share of a task's checks met, mean"),
        ("avg_reward", "reward", "tau2's own, mean"),
    ):
        lines.append((name, note, [_with_interval(run, key) for run in runs]))
    lines += [(name, "mean of an episode", [_mean(run, key) for run in runs]) for name, key in PER_EPISODE]
    return [{"name": name, "note": note, "cells": cells} for name, note, cells in lines if any(cells)]


PER_EPISODE = (
    ("agent turns", "agent_turns"),
    ("tool errors", "tool_errors"),
    ("calls of the customer's tools", "customer_tool_calls"),
)


def _mean(run: Run, key: str) -> Interval | None:
    found = [getattr(row, key) for row in run.rows if getattr(row, key) is not None]
    return Interval(value=statistics.fmean(found)) if found else None


def _pass_at_1(run: Run) -> Interval:
    return _with_interval(run, "pass_at_1")


def _with_interval(run: Run, key: str) -> Interval | None:
    plain = getattr(run.result, key)
    return getattr(run.result.metrics, key) or (None if plain is None else Interval(value=plain))


def conditions(runs: list[Run]) -> list[dict[str, Any]]:
    """What the numbers were measured with: {"name", "cells": one text per run, "same", "weighs"}.

    "weighs": runs that differ in it measure different things."""
    found = [_conditions(run.result) for run in runs]
    lines = []
    for name in found[0]:
        cells = [one[name] for one in found]
        same = len(set(cells)) == 1
        lines.append({"name": name, "cells": cells, "same": same, "weighs": not same and name in WEIGHS})
    return [line for line in lines if any(line["cells"])]


WEIGHS = {"Customer", "Prompt", "Tasks", "Step limit", "tau2"}


def in_short(runs: list[Run]) -> list[str]:
    """What stands under the title: without it the numbers say nothing."""
    found = {
        line["name"]: " / ".join(line["cells"][:1] if line["same"] else line["cells"]) for line in conditions(runs)
    }
    tasks = f"{found['Tasks']} tasks, trials: {found['Trials per task']}"
    names = {
        "Customer": "customer: {}",
        "Prompt": "{} prompt",
        "Seed": "seed {}",
        "Floor (always transfer)": "floor {}",
    }
    return [tasks, *(text.format(found[name]) for name, text in names.items() if name in found)]


def _conditions(result: Result) -> dict[str, str]:
    tasks = len({row.task_id for row in result.results})
    tokens = ", ".join(
        f"{name} {count:,.0f}" for name, count in result.tokens.items() if isinstance(count, int | float)
    )
    versions = {name: str(version) for name, version in result.versions.items() if version}
    return {
        "Checkpoint": _model(result),
        "Customer": " ".join(
            f"{value}" if key == "kind" else f"{key} {value}" for key, value in result.customer.items()
        ),
        "Prompt": _text(result.prompt),
        "Tasks": f"{tasks} {result.domain} {result.task_split}" + (", ids redrawn" if result.redraw_ids else ""),
        "Floor (always transfer)": decimals(result.floor_always_transfer),
        "Trials per task": f"{result.num_trials} ({len(result.results)} episodes)",
        "Seed": ", ".join(map(str, result.seeds)) or _text(result.seed),
        "Temperature": _text(result.temperature),
        "Step limit": _text(result.max_steps),
        "Tokens a turn, at most": _text(result.max_turn_tokens),
        "Tokens": tokens,
        "Minutes": _text(result.minutes),
        "Finished": (result.timestamp or "")[:19].replace("T", " "),
        "tau2": versions.pop("tau2", ""),
        "Git commit": versions.pop("git", ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _model(result: Result) -> str:
    if result.agent == "chat":
        return f"none here: the model “{_text(result.agent_llm)}” behind a chat-completions endpoint"
    return _text(result.checkpoint) or f"none: the scripted agent “{result.agent}”"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def comparison(runs: list[Run]) -> dict[str, Any] | None:
    """Each run with the one before it, and the last with the first: {"pairs": as tau2_compare gives them, "refused":
    [text]}; None for one run. Runs of different customers or prompts are compared too: the page says what differs."""
    neighbours = list(itertools.pairwise(runs))
    found = {"pairs": [], "refused": []}
    for a, b in [*neighbours, *([(runs[0], runs[-1])] if len(runs) > 2 else [])]:
        try:
            found["pairs"] += compare([_comparable(a), _comparable(b)], [a.label, b.label], anyway=True)["pairs"]
        except BadInput as error:
            found["refused"].append(str(error))
    return found if neighbours else None


def _comparable(run: Run) -> dict[str, Any]:
    rows = [row.model_dump(include={"task_id", "trial", "solved", "reward", "partial_score"}) for row in run.rows]
    result = run.result
    return {
        "settings": result.settings,
        "customer": result.customer,
        "versions": result.versions,
        "results": rows,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Figures: {"title", "note", "svg", "head": column names, "rows": cells}; the table says the same as the drawing


def result_figures(runs: list[Run]) -> list[dict[str, Any]]:
    found = [
        group_figure(runs, "by_issue_type", "pass@1 by issue type", "issue type"),
        group_figure(runs, "by_sub_issues", "pass@1 by number of sub-issues", "faults to find in one task"),
        group_figure(runs, "by_persona", "pass@1 by persona", "the customer's persona"),
        group_figure(runs, "by_changes", "pass@1 by number of changes", "gold actions that change something"),
        end_reason_figure(runs),
    ]
    return [figure for figure in found if figure]


def overall_figure(runs: list[Run]) -> dict[str, Any]:
    floor = runs[0].result.floor_always_transfer
    values = []
    for i, run in enumerate(runs):
        found = _pass_at_1(run)
        text = f"{run.label}: {decimals(found.value)} ({interval(found) or 'no interval'})"
        values.append({"run": run.label, "series": i, "text": text, **found.model_dump()})
    note = "" if floor is None else f"dashed: always-transfer floor, {decimals(floor)}"
    cells = [[value["run"], decimals(value["value"]), interval(value)] for value in values]
    return _figure(
        "pass@1", note, charts.dots(values, "share of episodes solved", floor), ["run", "pass@1", "interval"], cells
    )


def group_figure(runs: list[Run], key: str, title: str, axis: str) -> dict[str, Any] | None:
    names = sorted({name for run in runs for name in getattr(run.result, key)}, key=_natural)
    values, cells = [], []
    for name in names:
        for i, run in enumerate(runs):
            group = getattr(run.result, key).get(name)
            if group is None:
                continue
            shown = f"{group.successes}/{group.total}"
            text = f"{run.label}, {_words(name)}: {decimals(group.pass_at_1)} ({shown} solved; {interval(group)})"
            values.append(
                {"group": _group_label(name, group) if len(names) < 6 else _words(name), "run": run.label}
                | {"series": i, "value": group.pass_at_1, "low": group.low, "high": group.high, "text": text}
            )
            cells.append([_words(name), run.label, shown, decimals(group.pass_at_1), interval(group)])
    head = [axis, "run", "solved", "pass@1", "interval"]
    return _figure(title, "", charts.bars(values, axis), head, cells) if values else None


def _group_label(name: str, group: Group) -> str:
    return _words(name) if group.tasks is None else f"{_words(name)}\n{group.tasks} tasks"


def end_reason_figure(runs: list[Run]) -> dict[str, Any] | None:
    counts = [Counter(row.end_reason for row in run.rows) for run in runs]
    names = [name for name, _ in sum(counts, Counter()).most_common()]
    values, cells = [], []
    for name in names:
        for i, (run, count) in enumerate(zip(runs, counts, strict=True)):
            share = count[name] / count.total()
            text = f"{run.label}, {_words(name)}: {count[name]} of {count.total()}"
            values.append({"group": _words(name), "run": run.label, "series": i, "value": share, "text": text})
            cells.append([_words(name), run.label, str(count[name]), decimals(share)])
    svg = charts.rows(values, "share of episodes")
    return _figure("How episodes ended", "", svg, ["end reason", "run", "episodes", "share"], cells)


def trials_figure(runs: list[Run]) -> dict[str, Any] | None:
    """pass^k and pass@k over k; None with one trial."""
    values, cells = [], []
    for i, run in enumerate(runs):
        for dash, kind, found in (
            (0, "pass@", run.result.metrics.pass_at_k),
            (1, "pass^", run.result.metrics.pass_hat_k),
        ):
            ks = sorted((k for k in found if k.isdigit() and found[k]), key=int)
            for k in ks if len(ks) > 1 else ():
                name = f"{run.label}, {kind}k"
                text = f"{run.label}, {kind}{k}: {decimals(found[k].value)}"
                values.append(
                    {"x": int(k), "y": found[k].value, "name": name, "series": i, "dash": dash, "text": text}
                )
                cells.append([run.label, f"{kind}{k}", decimals(found[k].value), interval(found[k])])
    if not values:
        return None
    svg = charts.lines(values, "k trials", [0, 1])
    return _figure(
        "pass@k and pass^k", "any, and all, of k trials solved", svg, ["run", "", "value", "interval"], cells
    )


def training_section(runs: list[Run], name: str, rows: list[dict]) -> dict[str, Any]:
    """The curves that a run's metrics.jsonl has. A run evaluated under the same name keeps its colour."""
    labels = [run.label for run in runs]
    first = labels.index(name) if name in labels else 0
    keys = dict.fromkeys(key for row in rows for key in row)
    reasons = {key: _words(key.removeprefix(END_REASON_KEY)) for key in keys if key.startswith(END_REASON_KEY)}
    held_out = {key: key.removeprefix("eval/") for key in keys if key.startswith("eval/") and _is_mean(key)}
    wanted = [*CURVES, ("How episodes ended", reasons, [0, 1]), ("Validation reward", held_out, None)]
    drawn = [curve_figure(title, curves, rows, domain, first) for title, curves, domain in wanted]
    return {"name": name, "figures": [figure for figure in drawn if figure]}


def _is_mean(key: str) -> bool:
    """eval/NAME and none of what stands beside it: eval/NAME/..., eval/NAME-truncated_ratio, eval/step."""
    return key.count("/") == 1 and key != "eval/step" and not key.endswith("-truncated_ratio") and "-pass@" not in key


def curve_figure(
    title: str, curves: dict[str, str], rows: list[dict], domain: list[float] | None, first: int
) -> dict[str, Any] | None:
    values, cells = [], []
    for position, (key, name) in enumerate(curves.items()):
        for step, value in curve(rows, key):
            text = f"{name}, step {step}: {value:.4g}"
            look = {"series": first + position, "dash": position}
            values.append({"x": step, "y": value, "name": name, "text": text, **look})
            cells.append([name, str(step), f"{value:.4g}"])
    if not values:
        return None
    axis = "optimizer step" if next(iter(curves)).startswith("train/") else "rollout"
    return _figure(title, "", charts.lines(values, axis, domain), ["curve", axis, "value"], cells)


def curve(rows: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) in order. A resumed run writes a step again: the last one counts. Reasons that a rollout did not
    have are 0 there."""
    points = {}
    for row in rows:
        value = row.get(key, 0.0 if key.startswith(END_REASON_KEY) and "rollout/step" in row else None)
        if isinstance(value, int | float) and math.isfinite(value) and isinstance(row.get("step"), int):
            points[row["step"]] = value
    return sorted(points.items())


def _figure(title: str, note: str, svg: str, head: list[str], rows: list[list[str]]) -> dict[str, Any]:
    return {"title": title, "note": note, "svg": Markup(svg), "head": head, "rows": rows}


def _words(name: str) -> str:
    return name.removesuffix("_issue").replace("_", " ")


def _natural(name: str) -> tuple[float, str]:
    return (int(name) if name.isdigit() else math.inf, name)


# ---------------------------------------------------------------------------------------------------------------------
# Episodes


def choices(runs: list[Run]) -> dict[str, list[str]]:
    """What the reader's filters offer."""
    rows = [row for run in runs for row in run.rows]
    return {
        "issue": sorted({row.issue_type for row in rows}),
        "end": [reason for reason, _ in Counter(row.end_reason for row in rows).most_common()],
    }


def episode_id(label: str, row: Row) -> str:
    """The episode's address in the page; the same in every report in which the run has this name."""
    name = "".join(character if character.isalnum() and character.isascii() else "-" for character in label)
    return f"{name}-{zlib.crc32(f'{label} {row.task_id}'.encode()):08x}-{row.trial}"


def pack_episodes(runs: list[Run]) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """(task ids, what the list of episodes shows, packed blocks with the rest).

    An entry of the list points to its `block` and its place `at` in it. Episodes of one task lie together, which packs
    well; `told` of an entry is the place of the task's own text in the last block.
    """
    order = {task_id: i for i, task_id in enumerate(dict.fromkeys(row.task_id for run in runs for row in run.rows))}
    every = sorted(_episodes(runs), key=lambda found: (order[found[1].task_id], found[0], found[1].trial))
    texts = [{task.get("id"): json.dumps(_task_text(task)) for task in run.result.tasks} for run in runs]
    told: dict[str, int] = {}
    entries, full = [], []
    for number, (run, row, simulation) in enumerate(every):
        text = texts[run].get(row.task_id, "{}")
        entries.append(
            {
                "id": episode_id(runs[run].label, row),
                "run": run,
                "task": order[row.task_id],
                "block": number // BLOCK,
                "at": number % BLOCK,
                "told": told.setdefault(text, len(told)),
                **row.model_dump(include=LISTED),
            }
        )
        full.append(_details(row, simulation))
    parts = [full[start : start + BLOCK] for start in range(0, len(full), BLOCK)]
    return list(order), entries, [_pack(part) for part in [*parts, [json.loads(text) for text in told]]]


LISTED = {"trial", "issue_type", "end_reason", "solved", "reward", "partial_score", "agent_turns"}


def _episodes(runs: list[Run]) -> Iterator[tuple[int, Row, Simulation | None]]:
    for number, run in enumerate(runs):
        there = {(one.task_id, one.trial or 0): one for one in run.result.simulations}
        for row in run.rows:
            yield number, row, there.get((row.task_id, row.trial))


def _task_text(task: dict[str, Any]) -> dict[str, Any]:
    """What the agent and the customer were told."""
    return {key: task[key] for key in ("ticket", "user_scenario") if task.get(key)}


def _details(row: Row, simulation: Simulation | None) -> dict[str, Any]:
    """What an opened episode shows beside its entry in the list."""
    reward_info = (simulation.reward_info if simulation else None) or {}
    return {
        **row.model_dump(include={"checks", "detail", "seed", "steps", "tool_errors", "tokens"}),
        "assertions": [one.get("env_assertion") for one in _dicts(reward_info.get("env_assertions"))],
        "others": {key: reward_info[key] for key in ("db_check", "nl_assertions") if reward_info.get(key)},
        "messages": [message.model_dump(exclude_defaults=True) for message in simulation.messages]
        if simulation
        else None,
    }


def _dicts(value: Any) -> list[dict]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _pack(part: list[dict]) -> str:
    return base64.b64encode(gzip.compress(json.dumps(part, allow_nan=False).encode(), 9, mtime=0)).decode()


if __name__ == "__main__":
    sys.exit(main())
