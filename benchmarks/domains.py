"""What the domains' tasks give without a model: gold replay, always-transfer, do-nothing, each with the customer that
needs no model. No timing.

    python benchmarks/domains.py [--domain retail airline] [--split train test]

The gold replay does a task's gold actions and says what the task wants said: with the customer, and graded by tau2
itself without one (the same calls and words). `broken` are the tasks that only the customer
loses: there are none, so it does not break what can be solved. `refused`: gold calls that tau2's tools answer with an
error.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tau-bench"))

from tau2_domains import HAND_OVER, default_customer, fast_domain, load_tasks
from tau2_episode import AgentToolCall, AgentTurn, Episode, EpisodeConfig, run_episode
from tau2_reward_shaping import partial_score, shaped_reward
from tau2_teacher import HANDOVER, AlwaysTransfer, DoNothing


def gold_turns(task: Any) -> list[AgentTurn]:
    """The task's gold actions of the agent, one a turn, then one text with all that is to be said."""
    criteria = task.evaluation_criteria
    gold = [action for action in criteria.actions or [] if action.requestor == "assistant"]
    said = "Done: " + "; ".join(criteria.communicate_info or ["all that you asked for"])
    if any(action.name == HAND_OVER for action in gold):
        said = f"{said}. {HANDOVER}"
    calls = [AgentTurn(tool_calls=[AgentToolCall(action.name, dict(action.arguments))]) for action in gold]
    return [*calls, AgentTurn(content=f"{said}. Is there anything else?")]


class GoldReplay:
    """Knows the answers: shows what is solvable, and is no agent."""

    def __init__(self, task: Any) -> None:
        self.turns = gold_turns(task)

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        return None

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        return self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]


def tau2_grades(task: Any, domain: str) -> float:
    """tau2's reward of the gold turns alone, without a customer. The environment copies tau2's databases instead of
    parsing them again (tests compare the two)."""
    from tau2.data_model.message import AssistantMessage, ToolCall, UserMessage
    from tau2.data_model.simulation import SimulationRun, TerminationReason
    from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
    from tau2.registry import registry

    domain = fast_domain(domain)
    environment = registry.get_env_constructor(domain)()
    messages: list[Any] = [UserMessage(role="user", content="Hello.")]
    for number, turn in enumerate(gold_turns(task)):
        calls = [ToolCall(id=f"{number}", name=c.name, arguments=c.arguments) for c in turn.tool_calls] or None
        messages.append(AssistantMessage(role="assistant", content=turn.content, tool_calls=calls))
        messages += [environment.get_response(call) for call in calls or []]
    run = SimulationRun(
        id="gold",
        task_id=task.id,
        start_time="",
        end_time="",
        duration=0.0,
        termination_reason=TerminationReason.USER_STOP,
        messages=messages,
    )
    return evaluate_simulation(run, task, EvaluationType.ALL, solo_mode=False, domain=domain).reward


async def play(tasks: list[Any], domain: str, make: Any) -> list[Episode]:
    config = EpisodeConfig(domain, user=default_customer(domain))
    return [await run_episode(task, make(task), config) for task in tasks]


def row(name: str, episodes: list[Episode]) -> str:
    partial = statistics.fmean(partial_score(episode.checks) for episode in episodes)
    shaped = statistics.fmean(shaped_reward(episode.reward, episode.checks) for episode in episodes)
    solved = sum(episode.solved for episode in episodes)
    share = f"{solved:>4}/{len(episodes)} = {solved / len(episodes):.3f}"
    return f"  {name:<16}{share}   partial {partial:.3f}   R {shaped:.3f}"


def show(domain: str, tasks: list[Any], split: str) -> None:
    print(f"{domain} {split}, customer {default_customer(domain)}", flush=True)
    print(row("always-transfer", asyncio.run(play(tasks, domain, lambda task: AlwaysTransfer()))), flush=True)
    print(row("do-nothing", asyncio.run(play(tasks, domain, lambda task: DoNothing()))), flush=True)
    gold = asyncio.run(play(tasks, domain, GoldReplay))
    print(row("gold replay", gold), flush=True)
    grades = [tau2_grades(task, domain) for task in tasks]
    broken = [e.task_id for e, grade in zip(gold, grades, strict=True) if grade == 1.0 and not e.solved]
    refused = [e.task_id for e in gold if e.tool_errors]
    print(f"  tau2 grades it  {sum(grade == 1.0 for grade in grades):>4}/{len(tasks)}")
    print(f"  broken {broken}, refused {refused}, unsolved {[e.task_id for e in gold if not e.solved]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--domain", nargs="+", default=["retail", "airline"])
    parser.add_argument("--split", nargs="+", default=["train", "test"])
    args = parser.parse_args()
    for domain in args.domain:
        for split in args.split:
            show(domain, load_tasks(domain, split), split)
    return 0


if __name__ == "__main__":
    sys.exit(main())
