"""The shaped reward: weights, groups, and that no known exploit of the official action check earns anything."""

import asyncio
import importlib
import json
import statistics
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tau2_checks
from generate_with_tau import check_args
from slime_local.sample import Sample
from tau2_checks import sound_matches
from tau2_domains import HAND_OVER, load_tasks, load_tau2
from tau2_episode import AgentToolCall, AgentTurn, EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_reward_shaping import (
    MOST_PENALTY,
    check_shaped_reward_spread,
    check_shaped_reward_spread_with_fallback,
    episode_metrics,
    group_metrics,
    log_eval_rollout,
    log_rollout,
    partial_score,
    process_all_samples,
    shaped_reward,
    tau2_reward_post_process,
    trained_reward,
)
from tau2_teacher import DoNothing, ScriptedTeacher


def checks(action=(), communicate=(), assertion=()):
    return {
        "action_checks": [{"name": "f", "sound": met, "official": True} for met in action],
        "communicate_checks": [{"info": "x", "met": met} for met in communicate],
        "env_assertions": [{"func_name": "f", "met": met} for met in assertion],
    }


def sample(reward=0.0, group=0, action=(True,), status="COMPLETED", removed=False, **record):
    record = {"checks": checks(action), "end_reason": "user_stop", "reward": reward, "solved": reward == 1, **record}
    record = {"agent_turns": 2, "steps": 5, "tool_errors": 1, "agent_seconds": 3.0, "user_seconds": 1.0, **record}
    return Sample(
        group_index=group,
        reward=reward,
        status=Sample.Status[status],
        remove_sample=removed,
        metadata={"tau2": record},
        non_generation_time=1.5,
    )


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_checks, score",
    [
        (checks([True], [True], [True]), 1.0),
        (checks([True], [False], [False]), 0.7),
        (checks([False], [True], [False]), 0.1),
        (checks([False], [False], [True]), 0.2),
        (checks([True, False], [], [False]), 0.35 / 0.9),
        (checks([], [], [True, False]), 0.5),
        (checks(), 0.0),
        (None, 0.0),
    ],
)
def test_weights_are_renormalised_over_the_kinds_that_a_task_has(given_checks, score):
    assert partial_score(given_checks) == pytest.approx(score)


def test_official_matching_is_selectable_and_others_are_refused():
    assert partial_score(checks([False, False]), "official") == 1.0
    with pytest.raises(ValueError, match="sound, official"):
        partial_score(checks(), "tau2")


def test_shaped_reward_is_reward_plus_half_of_partial():
    assert shaped_reward(1.0, checks([True])) == 1.5
    assert shaped_reward(0.0, checks([True, False])) == 0.25
    assert shaped_reward(0.0, checks([True]), alpha=0.2) == 0.2


# ---------------------------------------------------------------------------------------------------------------------


class Turns:
    """An agent that says what it was given, then repeats its last turn."""

    def __init__(self, turns):
        self.turns = list(turns)

    async def start(self, messages, tools):
        self.tools = tools

    async def act(self, new_messages):
        return self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]


def gold(task):
    return [AgentToolCall(action.name, dict(action.arguments)) for action in task.evaluation_criteria.actions]


def empty_calls(task):
    return [AgentTurn(tool_calls=[AgentToolCall(name) for name in sorted({call.name for call in gold(task)})] * 2)]


def customers_tools(task):
    actions = [action for action in task.evaluation_criteria.actions if action.requestor == "user"]
    return [AgentTurn(tool_calls=[AgentToolCall(a.name, dict(a.arguments)) for a in actions])]


def failing_calls(task):
    calls = [AgentToolCall(call.name, {**call.arguments, "customer_id": "C0"}) for call in gold(task)]
    return [AgentTurn(tool_calls=calls)]


def phone_calls(task):
    """What the customer has to do on the phone; tau2's own gym adapter carries it out when the agent writes it."""
    return [call for call in gold(task) if call.name != "transfer_to_human_agents"] or [AgentToolCall("reboot_device")]


def json_as_text(task):
    calls = [{"name": c.name, "arguments": c.arguments, "requestor": "user"} for c in phone_calls(task)]
    return [AgentTurn(content="\n".join(map(json.dumps, calls)))]


def tool_call_tags_as_text(task):
    calls = [{"name": c.name, "arguments": c.arguments} for c in phone_calls(task)]
    return [AgentTurn(content=f"<tool_call>{json.dumps(call)}</tool_call>") for call in calls]


async def play(task, agent):
    return await run_episode(task, agent, EpisodeConfig(max_steps=60))


@pytest.mark.parametrize(
    "exploit, fools_official",
    [
        (empty_calls, True),
        (customers_tools, True),
        (failing_calls, True),
        (json_as_text, False),
        (tool_call_tags_as_text, False),
    ],
)
async def test_exploits_earn_no_more_than_doing_nothing(exploit, fools_official):
    """The ones that the official matcher falls for are shown to be real."""
    tasks = [task for task in load_tasks("telecom", "test") if gold(task)][::3]
    official = 0
    for task in tasks:
        episode, idle = await play(task, Turns(exploit(task))), await play(task, DoNothing())
        assert episode.reward == 0.0
        assert not any(check["sound"] for check in episode.checks["action_checks"]), task.id
        assert partial_score(episode.checks) <= partial_score(idle.checks), task.id
        official += sum(check["official"] for check in episode.checks["action_checks"])
    assert bool(official) == fools_official


async def test_one_call_counts_once():
    action = SimpleNamespace(name="f", requestor="assistant", arguments={"x": 1}, compare_args=None)
    call = SimpleNamespace(id="1", name="f", requestor="assistant", arguments={"x": 1})
    message = SimpleNamespace(role="assistant", tool_calls=[call])
    assert sound_matches([action, action], [message]) == [True, False]


def dialogue(turns, ids):
    """tau2's messages of turns (who, calls (name, x, error)); the calls get the ids in order."""
    message, ids = load_tau2().message, iter(ids)
    roles = {"assistant": message.AssistantMessage, "user": message.UserMessage}
    messages = []
    for who, made in turns:
        calls = [message.ToolCall(id=next(ids), name=n, arguments={"x": x}, requestor=who) for n, x, _ in made]
        messages.append(roles[who](role=who, tool_calls=calls or None, content=None if calls else "Hello."))
        messages += [
            message.ToolMessage(id=call.id, role="tool", requestor=who, error=error)
            for call, (_, _, error) in zip(calls, made, strict=True)
        ]
    return messages


NAMES = st.sampled_from(["f", "g", HAND_OVER])
SIDES = st.sampled_from(["assistant", "user"])
CALLS = st.lists(st.tuples(NAMES, st.integers(0, 1), st.booleans()), max_size=3)


@given(
    st.lists(st.tuples(SIDES, CALLS), max_size=8),
    st.lists(st.tuples(NAMES, SIDES, st.integers(0, 1)), max_size=6),
    st.lists(st.sampled_from(["", "call_0", "call_1"]), min_size=24, max_size=24),
)
def test_ids_of_calls_that_repeat_change_nothing(turns, wanted, ids):
    """Some providers give no ids, or count the calls of each message from 0."""
    actions = [
        SimpleNamespace(name=name, requestor=who, arguments={"x": x}, compare_args=None) for name, who, x in wanted
    ]
    without_errors = [(who, [call for call in made if not call[2]]) for who, made in turns]
    expected = sound_matches(actions, dialogue(without_errors, map(str, range(24))))
    handed_over = ("assistant", HAND_OVER) in [(who, name) for who, made in without_errors for name, _, _ in made]
    for some in (map(str, range(24)), ids):
        messages = dialogue(turns, some)
        assert sound_matches(actions, messages) == expected
        assert tau2_checks.handed_over([], messages) == handed_over


async def test_the_teacher_gets_all_of_it_and_a_truncated_episode_keeps_its_share():
    task = next(t for t in load_tasks("telecom", "test") if "mms" in t.id and len(gold(t)) > 3)
    done = await run_episode(task, ScriptedTeacher(), EpisodeConfig())
    cut = await run_episode(task, ScriptedTeacher(), EpisodeConfig(max_steps=done.steps - 4))
    assert shaped_reward(done.reward, done.checks) == 1.5
    assert cut.reward == 0.0 and 0.0 < partial_score(cut.checks) <= 1.0


# ---------------------------------------------------------------------------------------------------------------------


def test_slimes_contract_with_bare_args_and_bare_samples():
    samples = [
        Sample(index=i, reward=r, tokens=[1, 2], response_length=2, status=Sample.Status.COMPLETED, loss_mask=[1, 1])
        for i, r in enumerate((0.5, 1.5))
    ]
    raw, rewards = tau2_reward_post_process(type("Args", (), {})(), samples)
    assert raw == [0.5, 1.5] and rewards == [0.0, 0.0]  # no group: nothing to compare with


def test_groups_are_normalised_apart_and_uneven_groups_right():
    args = SimpleNamespace(advantage_estimator="grpo", rewards_normalization=True, grpo_std_normalization=True)
    samples = [sample(1.0, 0), sample(0.0, 1), sample(0.0, 0, (False,)), sample(1.0, 1), sample(0.0, 1)]
    raw, rewards = tau2_reward_post_process(args, samples)
    assert raw == [1.0, 0.0, 0.0, 1.0, 0.0]
    first, second = [1.5, 0.0], [0.5, 1.5, 0.5]
    expected = [(v - statistics.fmean(g)) / (statistics.stdev(g) + 1e-6) for g in (first, second) for v in g]
    assert [rewards[0], rewards[2], rewards[1], rewards[3], rewards[4]] == pytest.approx(expected)


def test_the_same_numbers_as_slimes_own_normalisation_on_even_groups():
    torch = pytest.importorskip("torch")
    samples = [sample(r, g) for g, rewards in enumerate([(1, 0, 0, 1), (0, 0, 0, 1)]) for r in map(float, rewards)]
    rewards = torch.tensor([s.reward + 0.5 for s in samples]).reshape(2, 4)
    rewards = rewards - rewards.mean(dim=-1, keepdim=True)
    rewards = rewards / (rewards.std(dim=-1, keepdim=True) + 1e-6)
    _, ours = tau2_reward_post_process(SimpleNamespace(), samples)
    assert ours == pytest.approx(rewards.flatten().tolist(), abs=1e-5)


@pytest.mark.parametrize("gone", [{"status": "ABORTED"}, {"status": "FAILED", "removed": True}])
def test_what_holds_no_episode_gets_nothing_and_moves_nobody(gone):
    samples = [sample(1.0), sample(0.0), sample(0.0, **gone)]
    _, rewards = tau2_reward_post_process(SimpleNamespace(), samples)
    _, without = tau2_reward_post_process(SimpleNamespace(), samples[:2])
    assert rewards == [*without, 0.0]
    assert tau2_reward_post_process(SimpleNamespace(), [sample(1.0), samples[2]])[1] == [0.0, 0.0]


def test_normalisation_flags_are_honoured():
    samples = [sample(1.0), sample(0.0, action=(False,))]
    plain = SimpleNamespace(rewards_normalization=False)
    assert tau2_reward_post_process(plain, samples)[1] == [1.5, 0.0]
    assert tau2_reward_post_process(SimpleNamespace(advantage_estimator="ppo"), samples)[1] == [1.5, 0.0]
    assert tau2_reward_post_process(SimpleNamespace(grpo_std_normalization=False), samples)[1] == [0.75, -0.75]
    assert tau2_reward_post_process(SimpleNamespace(tau2_partial_alpha=0, rewards_normalization=False), samples)[
        1
    ] == [
        1.0,
        0.0,
    ]


def test_sample_reward_is_left_alone():
    samples = [sample(1.0), sample(0.0)]
    tau2_reward_post_process(SimpleNamespace(), samples)
    assert [s.reward for s in samples] == [1.0, 0.0]


def test_a_batch_lost_to_a_configuration_mistake_stops_the_run():
    lost = [sample(status="ABORTED", removed=True, bad_input="no such domain") for _ in range(2)]
    with pytest.raises(RuntimeError, match="no such domain"):
        tau2_reward_post_process(SimpleNamespace(), lost)
    tau2_reward_post_process(SimpleNamespace(), [*lost, sample(1.0)])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.booleans()), max_size=12))
def test_advantages_of_every_group_add_up_to_zero(rows):
    samples = [
        sample(float(solved), group, (met,), "ABORTED" if lost else "COMPLETED") for group, solved, met, lost in rows
    ]
    _, rewards = tau2_reward_post_process(SimpleNamespace(), samples)
    assert len(rewards) == len(samples)
    for group in range(4):
        assert sum(r for r, s in zip(rewards, samples, strict=True) if s.group_index == group) == pytest.approx(
            0, abs=1e-6
        )


# ---------------------------------------------------------------------------------------------------------------------


def test_what_a_sample_filter_keeps_out_of_the_loss_stays_in_its_group():
    """slime's --rollout-sample-filter-path: it "does not determine whether the sample participates in advantage
    normalization"."""
    samples = [sample(1.0), sample(1.0), *(sample(0.0, action=(False,), status="TRUNCATED") for _ in range(2))]
    before = tau2_reward_post_process(SimpleNamespace(), samples)
    for cut_off in samples[2:]:
        cut_off.remove_sample = True
    assert tau2_reward_post_process(SimpleNamespace(), samples) == before
    assert before[0] == [1.0, 1.0, 0.0, 0.0] and before[1][0] > 0 > before[1][2]
    args = SimpleNamespace(rollout_batch_size=1)
    for _ in range(4):
        tau2_reward_post_process(args, samples[2:])  # a whole batch of them ends no run
    assert episode_metrics(args, samples)["pass_rate"] == 0.5


@pytest.mark.parametrize("home", ["slime.observability", "slime.utils"])
def test_what_slime_gives_no_dict_for_goes_out_by_its_own_logger(home, monkeypatch, tmp_path):
    """An evaluation's metrics, in slime as it is and as it was (v0.3.1)."""
    folder = tmp_path.joinpath(*home.split("."))
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    log = "def log(args, metrics, step_key): sent.append((metrics, step_key))"
    (folder / "logging_utils.py").write_text(f"sent = []\n{log}")
    (folder / "metric_utils.py").write_text("def compute_rollout_step(args, rollout_id): return 10 * rollout_id")
    for name in [name for name in sys.modules if name.split(".")[0] == "slime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    log_eval_rollout(4, SimpleNamespace(use_wandb=True), {"a": eval_data(1, 0)}, None)
    ((metrics, step_key),) = importlib.import_module(f"{home}.logging_utils").sent
    assert metrics["eval/a/pass_rate"] == 0.5 and metrics[step_key] == 40
    for name in [name for name in sys.modules if name.split(".")[0] == "slime"]:
        monkeypatch.delitem(sys.modules, name)


def test_metrics_name_end_reasons_and_leave_lost_episodes_out_of_the_means():
    samples = [
        sample(1.0, issue_type="mms_issue"),
        sample(0.0, action=(False,), issue_type="mms_issue", end_reason="max_steps"),
        sample(1.0, issue_type="service_issue"),
        sample(0.0, status="FAILED", removed=True, end_reason="user_failed"),
    ]
    samples[3].metadata["tau2"]["reward"] = None
    metrics = episode_metrics(SimpleNamespace(), samples)
    assert metrics["stop/user_stop"] == 0.5 and metrics["stop/user_failed"] == 0.25
    assert metrics["aborted"] == 1 and metrics["pass_rate"] == pytest.approx(2 / 3)
    assert metrics["pass_rate/mms_issue"] == 0.5 and metrics["pass_rate/service_issue"] == 1.0
    assert metrics["partial_score"] == pytest.approx(2 / 3) and metrics["tool_errors"] == 1
    assert metrics["seconds/generation"] == 3.0 and metrics["seconds/other"] == 0.5


def test_log_hooks_add_to_what_slime_logs_and_let_it_go_on():
    args, extra, extra_eval = SimpleNamespace(), {"reward": 1.0}, {}
    assert log_rollout(3, args, [Sample(index=0)], extra, 0.5) is False and args.logged_rollout_id == 3
    counted = {"reward": 1.0, "rollout/stop/unknown": 1.0, "rollout/aborted": 0, "rollout/groups/broken": 1}
    assert counted.items() <= extra.items()
    data = {"test": {"rewards": [1.0], "truncated": [False], "samples": [sample(1.0)]}}
    assert log_eval_rollout(4, args, data, extra_eval) is False and args.logged_eval_rollout_id == 4
    assert extra_eval["eval/test/pass_rate"] == 1.0
    assert log_eval_rollout(4, args, data, None) is False


def test_the_logged_reward_of_training_is_that_of_the_episodes():
    samples = [sample(1.0), sample(0.0), sample(1.0, 1), sample(0.0, 1, status="FAILED", removed=True)]
    raw, rewards = tau2_reward_post_process(SimpleNamespace(), samples)
    assert statistics.fmean(raw) == pytest.approx(2 / 3) and raw[:3] == [1.0, 0.0, 1.0]
    assert rewards[3] == 0.0


def eval_data(*rewards):
    """An evaluation as both hosts hand it over; None: a broken episode."""
    broken = {"status": "FAILED", "removed": True, "end_reason": "user_failed"}
    samples = [sample(float(r)) if r is not None else sample(0.0, **broken) for r in rewards]
    return {"rewards": [s.reward for s in samples], "truncated": [False] * len(samples), "samples": samples}


def test_what_broke_in_an_evaluation_counts_neither_way(caplog):
    args = SimpleNamespace(n_samples_per_eval_prompt=2, log_passrate=False)
    data, extra = {"a": eval_data(1, 1, None, 0), "b": eval_data(None), "c": eval_data(1)}, {}
    lists = data["a"]["rewards"]
    assert log_eval_rollout(0, args, data, extra) is False
    assert lists == data["a"]["rewards"] == [1.0, 1.0, 0.0] and len(data["a"]["samples"]) == 3
    assert len(data["a"]["truncated"]) == 3 and set(data) == {"a", "c"}, "of b there is no number"
    assert extra["eval/a/aborted"] == 1 and extra["eval/a/stop/user_failed"] == 0.25 and extra["eval/b/aborted"] == 1
    assert "eval a: 1 of 4 episodes broken and left out (user_failed 1)" in caplog.text
    args.log_passrate, data = True, {"a": eval_data(1, 1, None, 0)}
    log_eval_rollout(0, args, data, {})
    assert data["a"]["rewards"] == [1.0, 1.0], "pass@k needs whole groups"


def test_partial_score_reads_what_run_episode_writes():
    task = load_tasks("telecom", "test")[0]
    episode = asyncio.run(run_episode(task, DoNothing(), EpisodeConfig()))
    assert set(episode.checks) == {*"action_checks communicate_checks env_assertions reward_basis given_up".split()}


# ---------------------------------------------------------------------------------------------------------------------
# Groups without a spread, and the penalty for the customer's tools

FAILED = [sample(action=(False,)), sample(action=(False,))]
FAILED_BUT_PARTLY = [sample(action=(True, False)), sample(action=(False, False))]
SOLVED = [sample(1.0), sample(1.0)]
MIXED = [sample(1.0), sample(0.0)]
BROKEN = [sample(1.0), sample(0.0, status="FAILED", removed=True), sample(0.0, status="ABORTED")]


@pytest.mark.parametrize(
    ("group", "keep", "reason"),
    [
        (FAILED, False, "no_spread_failed"),
        (FAILED_BUT_PARTLY, True, None),
        (SOLVED, False, "no_spread_solved"),
        (MIXED, True, None),
        (BROKEN, False, "no_spread_broken"),
    ],
)
def test_the_filter_keeps_what_the_trained_reward_tells_apart(group, keep, reason):
    output = check_shaped_reward_spread(SimpleNamespace(), group)
    assert (output.keep, output.reason, output.keep_when_insufficient) == (keep, reason, False)
    assert check_shaped_reward_spread_with_fallback(SimpleNamespace(), group).keep_when_insufficient
    advantages = tau2_reward_post_process(SimpleNamespace(), group)[1]
    assert keep == any(value != 0 for value in advantages)


def lost_group(number, **record):
    record = {"end_reason": "user_failed", "detail": "HTTP 500", **record}
    return [sample(group=number, status="FAILED", removed=True, **record) for _ in range(4)]


@pytest.mark.parametrize("filter_", [check_shaped_reward_spread, check_shaped_reward_spread_with_fallback])
@pytest.mark.parametrize(
    ("record", "told"), [({}, "user_failed: HTTP 500"), ({"bad_input": "no room for a turn"}, "no room for a turn")]
)
def test_the_filter_ends_a_run_in_which_nothing_runs(filter_, record, told):
    """A rollout that draws another group for each would never end, whatever the reason."""
    args = SimpleNamespace(rollout_batch_size=2, over_sampling_batch_size=3)
    for number in range(8):
        assert filter_(args, lost_group(number, **record)).reason == "no_spread_broken"
    with pytest.raises(RuntimeError, match=f"no episode could run in 9 groups on end; 9 of them: {told}"):
        filter_(args, lost_group(8, **record))


def test_an_episode_in_between_begins_the_count_anew_and_runs_do_not_share_it():
    args, other = (SimpleNamespace(rollout_batch_size=1) for _ in range(2))
    for number in range(10):
        check_shaped_reward_spread(args, lost_group(number) if number % 3 else [sample(), *lost_group(number)])
    check_shaped_reward_spread(other, lost_group(0))


def test_without_a_filter_batches_of_nothing_end_the_run():
    args = SimpleNamespace(rollout_batch_size=2)
    batches = [[*lost_group(number), *lost_group(number + 1)] for number in (0, 2, 4)]
    for batch in batches[:2]:
        assert tau2_reward_post_process(args, batch)[1] == [0.0] * 8
        tau2_reward_post_process(args, batch)  # groups that were counted before
    with pytest.raises(RuntimeError, match="in 6 groups on end"):
        tau2_reward_post_process(args, batches[2])


def test_without_partial_credit_the_filter_sees_the_binary_reward():
    assert not check_shaped_reward_spread(SimpleNamespace(tau2_partial_alpha=0), FAILED_BUT_PARTLY).keep


def test_group_metrics_say_what_partial_credit_adds():
    metrics = group_metrics(SimpleNamespace(), [FAILED, FAILED_BUT_PARTLY, SOLVED, MIXED, BROKEN])
    counts = {"all": 5, "failed": 2, "solved": 1, "mixed": 1, "broken": 1}
    assert metrics == {
        **{f"groups/{name}": count for name, count in counts.items()},
        "groups/failed_with_gradient": 1,
        "groups/solved_with_gradient": 0,
    }


def test_the_log_counts_dropped_groups_where_the_hook_saw_them():
    args, extra, told = SimpleNamespace(), {}, []
    source = SimpleNamespace(record_outcomes=told.extend, metrics=lambda: {"curriculum/open": 3})
    process_all_samples(args, [FAILED, MIXED], source)
    assert told == [*FAILED, *MIXED]
    log_rollout(0, args, MIXED, extra, 1.0)
    assert (extra["rollout/groups/all"], extra["rollout/groups/failed"]) == (2, 1)
    assert extra["rollout/curriculum/open"] == 3
    log_rollout(1, args, MIXED, extra, 1.0)  # a rollout without the hook: nothing of the last one is left
    assert (extra["rollout/groups/all"], extra["rollout/groups/failed"]) == (1, 0)


@given(
    st.integers(0, 50), st.floats(0, 5), st.lists(st.booleans(), min_size=1, max_size=4), st.sampled_from([0.0, 1.0])
)
def test_the_penalty_is_off_by_default_and_never_puts_a_solved_episode_below_another(calls, penalty, action, reward):
    episode = sample(reward, action=action, customer_tool_calls=calls)
    plain, punished = SimpleNamespace(), SimpleNamespace(tau2_customer_tool_penalty=penalty)
    assert trained_reward(plain, episode) == shaped_reward(reward, checks(action))
    paid = trained_reward(plain, episode) - trained_reward(punished, episode)
    assert paid == pytest.approx(min(calls * penalty, MOST_PENALTY))
    assert episode.reward == reward
    failed = sample(0.0, action=[True])
    assert reward == 0.0 or trained_reward(punished, episode) > trained_reward(punished, failed)


def test_what_a_limit_cut_off_has_no_partial_credit():
    """A loop that asks for everything until the context is full would beat a wrong goodbye."""
    ended, cut = sample(action=[True, False]), sample(action=[True, True], status="TRUNCATED")
    assert (trained_reward(SimpleNamespace(), ended), trained_reward(SimpleNamespace(), cut)) == (0.25, 0.0)
    _, rewards = tau2_reward_post_process(SimpleNamespace(), [ended, cut])
    assert rewards[0] > 0 > rewards[1]
    assert not check_shaped_reward_spread(SimpleNamespace(), [cut, sample(status="TRUNCATED", action=[False])]).keep


def test_settings_of_the_reward_are_checked_before_a_rollout():
    for name, value in [
        ("partial_alpha", "much"),
        ("customer_tool_penalty", -1),
        ("customer_tool_penalty", float("nan")),
        ("partial_matching", "tau2"),
    ]:
        with pytest.raises(BadInput, match=f"tau2_{name}"):
            check_args(SimpleNamespace(**{f"tau2_{name}": value}))
    check_args(SimpleNamespace(tau2_customer_tool_penalty=0.1, tau2_partial_matching="official"))
