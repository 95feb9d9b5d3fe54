"""How an episode is graded: tau2's own reward, and the checks that partial credit reads.

A library, used by tau2_episode.py when an episode ends, and for recorded ones by

    python examples/tau-bench/evaluate_tau2.py rescore OUTPUT.json
"""

from __future__ import annotations

from typing import Any

from tau2_domains import HAND_OVER, earns_credit, fast_domain, gold_actions, load_tau2, using_databases
from tau2_errors import BadInput
from tau2_redraw import redraw

SUCCESS_TOLERANCE = 1e-6


def score(task: Any, simulation: Any, domain: str, is_truncated: bool) -> tuple[Any, dict]:
    """tau2's RewardInfo, and the checks; those of a truncated episode from a copy that counts as stopped."""
    official = reward_info = _evaluate(task, simulation, domain)
    if is_truncated:
        stopped = {
            "messages": _without_dangling_call(simulation.messages),
            "termination_reason": load_tau2().simulation.TerminationReason.USER_STOP,
        }
        reward_info = _evaluate(task, simulation.model_copy(update=stopped), domain)
    checks = _checks(task, simulation.messages, reward_info, domain)
    if is_truncated:
        checks.pop("db_match", None)  # nobody is done: that nothing was spoilt so far is no merit
    return official, checks


def _evaluate(task: Any, simulation: Any, domain: str) -> Any:
    return load_tau2().evaluate_simulation(
        simulation=simulation.model_copy(update={"messages": _ReadOnly(simulation.messages)}),
        task=task,
        evaluation_type=load_tau2().EvaluationType.ALL,
        solo_mode=False,
        domain=fast_domain(domain),
    )


class _ReadOnly(list):
    """Messages that are only read: tau2's evaluator copies them deeply before each of its replays, for nothing."""

    def __deepcopy__(self, memo: dict) -> list:
        return list(self)


def _without_dangling_call(messages: list) -> list:
    """Drops a last message whose tool calls were never answered: tau2's replay refuses it."""
    return messages[:-1] if messages and getattr(messages[-1], "tool_calls", None) else messages


def _checks(task: Any, messages: list, reward_info: Any, domain: str) -> dict[str, Any]:
    """What partial credit reads. `official` is tau2's own action match, `sound` the one that cannot be gamed;
    `look_up`: a gold action that changes nothing; `db_match`: where the database counts; `given_up`: not solved, and
    handed over to a human needlessly."""
    gold, basis = gold_actions(task), [basis.value for basis in reward_info.reward_basis or []]
    official = [check.action_match for check in reward_info.action_checks or []]
    action_checks = [
        {
            "name": a.name,
            "requestor": a.requestor,
            "arguments": a.arguments,
            "official": match,
            "sound": sound,
            **({} if earns_credit(a, domain) else {"look_up": True}),
        }
        for a, match, sound in zip(gold, official, sound_matches(gold, messages), strict=True)
    ]
    return {
        "action_checks": action_checks,
        "communicate_checks": [{"info": c.info, "met": c.met} for c in reward_info.communicate_checks or []],
        "env_assertions": [
            {"func_name": c.env_assertion.func_name, "met": c.met} for c in reward_info.env_assertions or []
        ],
        "reward_basis": basis,
        **({"db_match": reward_info.db_check.db_match} if "DB" in basis and reward_info.db_check else {}),
        "given_up": reward_info.reward < 1 - SUCCESS_TOLERANCE and handed_over(gold, messages),
    }


def handed_over(gold: list, messages: list) -> bool:
    """Whether the agent gave the customer to a human where the task does not ask for it."""
    called = any((call.name, call.requestor) == (HAND_OVER, "assistant") for call in _made(messages))
    return called and not any(action.name == HAND_OVER for action in gold)


def _made(messages: list) -> list:
    """The calls of both sides that no tool answered with an error. A call is answered by the tool message in its place
    behind the turn, as in tau2's own replay: ids need not differ, some providers count them anew in each message."""
    made = []
    for place, message in enumerate(messages):
        results = _results_behind(messages, place)
        for number, call in enumerate(getattr(message, "tool_calls", None) or []):
            is_answered = number < len(results)
            if not (is_answered and results[number].error):
                made.append(call)
    return made


def _results_behind(messages: list, place: int) -> list:
    """The tool messages that follow the one at `place` at once and answer its side."""
    results = []
    for message in messages[place + 1 :]:
        if message.role != "tool":
            break
        if message.requestor == messages[place].role:
            results.append(message)
    return results


def sound_matches(gold: list, messages: list) -> list[bool]:
    """For each gold action: was it done by the right side, without a tool error, with exactly its arguments?

    Each call made counts for one gold action at most. `compare_args` is respected: [] accepts any arguments. So does a
    hand-over, whose only argument is a summary in free words."""
    made, matches = _made(messages), []
    for action in gold:
        hit = next((i for i, call in enumerate(made) if _same_action(action, call)), None)
        matches.append(hit is not None)
        if hit is not None:
            del made[hit]
    return matches


def _same_action(action: Any, call: Any) -> bool:
    if (action.name, action.requestor) != (call.name, call.requestor):
        return False
    if action.name == HAND_OVER:
        return True
    if action.compare_args is None:
        return action.arguments == call.arguments
    return all(action.arguments.get(key) == call.arguments.get(key) for key in action.compare_args)


def rescore(
    task: Any, simulation: dict, domain: str, is_truncated: bool, redraw_seed: int | None = None
) -> tuple[dict, dict]:
    """(tau2's reward_info, checks) of a recorded episode: its calls are replayed, no model is asked.

    simulation: tau2's SimulationRun as JSON values. redraw_seed: the episode's seed, where its names and ids were
    drawn anew. Raises BadInput where the recorded tool results are not those that tau2 gives today."""
    run = load_tau2().simulation.SimulationRun.model_validate(simulation)
    databases = None
    if redraw_seed is not None:
        task, databases = redraw(task, redraw_seed)
    try:
        with using_databases(databases):
            reward_info, checks = score(task, run, domain, is_truncated)
    except ValueError as error:
        raise BadInput(f"task {task.id}: the episode cannot be replayed: {error}"[:500]) from error
    return reward_info.model_dump(mode="json"), checks
