"""One whole scripted episode with its evaluation, beside tau2's own ways to run one.

    python benchmarks/episode.py            # --quick: 40 test tasks; without: all 2285 give the same reward_info

Three sides run the same dialogue (the scripted teacher, the scripted customer) on the same task, one after the other:
`run_episode`; tau2's Orchestrator and evaluate_simulation as shipped; tau2's AgentGymEnv. The rewards are compared
field by field. The lists of tools that `tau2 run` also builds for every episode, longer than the episode itself, are
left out of the second side; the third result gives the time with them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import sys
from typing import Any

from common import measure, need, parser, ratio, write_result

from tau2_domains import load_tasks, load_tau2
from tau2_episode import EpisodeConfig, run_episode
from tau2_teacher import ScriptedTeacher
from tau2_users import ScriptedCustomer

MAX_STEPS = EpisodeConfig().max_steps
BLOCK = 10  # tasks that one side runs in a row: alternating every episode, each side would find cold caches
GYM_TASKS, QUICK_GYM_TASKS = 12, 3  # an episode takes it about ten seconds


# ---------------------------------------------------------------------------------------------------------------------
# The three sides: a task in, (reward_info, what was said) out
# ---------------------------------------------------------------------------------------------------------------------


def ours(loop: asyncio.AbstractEventLoop, task: Any) -> Any:
    simulation = loop.run_until_complete(run_episode(task, ScriptedTeacher())).simulation
    return simulation.reward_info, said(simulation.messages)


def shipped(task: Any, tools: bool = False) -> Any:
    tau2 = load_tau2()
    environment = tau2.registry.get_env_constructor("telecom")()
    if tools:
        environment.get_tools(), environment.get_user_tools()
    orchestrator = tau2.orchestrator.Orchestrator(
        domain="telecom",
        agent=TeacherAgent(),
        user=CustomerUser(instructions=task.user_scenario),
        environment=environment,
        task=task,
        max_steps=MAX_STEPS,
    )
    simulation = orchestrator.run()
    reward_info = tau2.evaluate_simulation(
        simulation=simulation, task=task, evaluation_type=tau2.EvaluationType.ALL, solo_mode=False, domain="telecom"
    )
    return reward_info, said(simulation.messages)


def gym(task: Any) -> Any:
    from tau2.gym import gym_agent

    gym_agent.UserSimulator = CustomerUser  # otherwise a paid model plays the customer
    environment = gym_agent.AgentGymEnv("telecom", task.id, max_steps=MAX_STEPS)
    observation, info = environment.reset()
    teacher, ended = ScriptedTeacher(), False
    while not ended:
        turn = answer(teacher, observation.split(": ", 1)[1])
        action = json.dumps(vars(turn.tool_calls[0])) if turn.tool_calls else turn.content
        observation, _, ended, _, info = environment.step(action)
    types = load_tau2().simulation
    run = types.SimulationRun.model_validate_json(info["simulation_run"])
    return types.RewardInfo.model_validate_json(info["reward_info"]), said(run.messages)


class TeacherAgent:
    """The scripted teacher as an agent of tau2's orchestrator."""

    def __init__(self) -> None:
        self.teacher, self.calls = ScriptedTeacher(), 0

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        message_types = load_tau2().message
        turn = answer(self.teacher, message.content)
        calls = []
        for call in turn.tool_calls:
            self.calls += 1
            calls.append(message_types.ToolCall(id=f"call_{self.calls}", name=call.name, arguments=call.arguments))
        made = message_types.AssistantMessage(
            role="assistant", content=turn.content, tool_calls=calls or None, cost=0.0
        )
        return made, state

    def get_init_state(self, message_history: list | None = None) -> None:
        return None

    def is_stop(self, message: Any) -> bool:
        return False

    def stop(self, message: Any = None, state: Any = None) -> None:
        return None


class CustomerUser:
    """The scripted customer as a user of tau2's orchestrator, built as tau2 builds its user simulator."""

    def __init__(self, instructions: Any, **unused: Any) -> None:
        self.customer = ScriptedCustomer(instructions)

    def generate_next_message(self, message: Any, state: Any) -> tuple[Any, Any]:
        return self.customer.reply(message), state

    def get_init_state(self, message_history: list | None = None) -> None:
        return None

    def stop(self, message: Any = None, state: Any = None) -> None:
        return None


def answer(teacher: ScriptedTeacher, text: str) -> Any:
    """The teacher's next turn; its coroutine never waits, so it needs no event loop."""
    try:
        teacher.act([{"content": text}]).send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("the teacher waited for something")


def said(messages: list) -> list[tuple]:
    """What a dialogue consists of, without ids and times."""
    calls = [[(call.name, call.arguments) for call in getattr(m, "tool_calls", None) or []] for m in messages]
    return [(m.role, m.content, made) for m, made in zip(messages, calls, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def compare(sides: dict[str, Any], tasks: list, block: int) -> tuple[dict[str, list[float]], int]:
    """Seconds an episode of every side, by blocks of tasks, and how many tasks gave one reward_info and dialogue."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    same = 0
    for start in range(0, len(tasks), block):
        some, answers = tasks[start : start + block], {name: [] for name in sides}
        names = list(sides) if start // block % 2 == 0 else list(reversed(sides))
        once = measure({name: functools.partial(keep, answers[name], sides[name], some) for name in names}, 1, 0)
        for name, values in once.items():
            seconds[name].append(values[0] / len(some))
        same += sum(all_same(list(given), task) for task, *given in zip(some, *answers.values(), strict=True))
    return seconds, same


def keep(answers: list, run: Any, tasks: list) -> None:
    for task in tasks:
        answers.append(run(task))


def all_same(answers: list, task: Any) -> bool:
    rewards, dialogues = zip(*answers, strict=True)
    same = all(r.model_dump() == rewards[0].model_dump() for r in rewards) and all(
        d == dialogues[0] for d in dialogues
    )
    if not same:
        print(f"different: {task.id}", file=sys.stderr)
    return same


def main() -> int:
    args = parser(__doc__).parse_args()
    need("gymnasium", "gymnasium")
    # Not asyncio.run for each episode: its handler of Ctrl-C spells out the whole result, a tenth of the time.
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        run_ours = functools.partial(ours, loop)
        for task in load_tasks("telecom", "test")[:3]:
            run_ours(task), shipped(task)  # imports and caches
        passed = beside_orchestrator(args, "episode-orchestrator", shipped, run_ours)
        passed &= beside_orchestrator(args, "episode-tau2-run", functools.partial(shipped, tools=True), run_ours)
        passed &= beside_gym(args, run_ours)
    return 0 if passed else 1


def beside_orchestrator(args: argparse.Namespace, name: str, theirs: Any, run_ours: Any) -> bool:
    with_tools = name == "episode-tau2-run"
    question = "scripted episode with its evaluation, beside tau2's Orchestrator and evaluate_simulation as shipped"
    return report(
        args,
        name,
        question + (", with the tool lists that tau2 run builds" if with_tools else ""),
        load_tasks("telecom", "test" if args.quick or with_tools else "full"),
        {"tau2": theirs, "ours": run_ours},
        target=None if with_tools else 2.5,
    )


def beside_gym(args: argparse.Namespace, run_ours: Any) -> bool:
    tasks = load_tasks("telecom", "test")
    tasks = tasks[:: len(tasks) // (QUICK_GYM_TASKS if args.quick else GYM_TASKS)]
    question = "scripted episode with its evaluation, beside tau2's AgentGymEnv"
    return report(args, "episode-gym", question, tasks, {"tau2": gym, "ours": run_ours}, target=300, block=1)


def report(
    args: argparse.Namespace,
    name: str,
    question: str,
    tasks: list,
    sides: dict[str, Any],
    target: float | None,
    block: int = BLOCK,
) -> bool:
    """Writes the result; whether all tasks gave the same reward_info and dialogue on both sides."""
    seconds, same = compare(sides, tasks, block)
    write_result(
        name,
        question,
        {side: [1000 * value for value in values] for side, values in seconds.items()},
        unit="ms",
        ratio=ratio(seconds, "tau2", "ours"),
        target=target,
        quick=args.quick,
        details={"tasks": len(tasks), "same_reward_info_and_dialogue": same},
        folder=args.results,
    )
    print(f"same reward_info and dialogue: {same} of {len(tasks)} tasks")
    return same == len(tasks)


if __name__ == "__main__":
    sys.exit(main())
