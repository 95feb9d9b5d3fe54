"""pass@k and pass^k against counting, intervals, groups, and what paired differences may claim."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tau2_domains import load_tasks
from tau2_metrics import (
    behaviour,
    breakdowns,
    by_task,
    estimate,
    flips,
    metrics,
    paired_difference,
    pass_at_k,
    pass_hat_k,
    persona,
    sub_issues,
    task_means,
)


def rows(**solved):
    """rows(a="110", b="000"): a task each, a trial per digit."""
    return [
        {
            "task_id": task,
            "trial": trial,
            "solved": digit == "1",
            "reward": float(digit),
            "partial_score": float(digit),
        }
        for task, digits in solved.items()
        for trial, digit in enumerate(digits)
    ]


@given(st.integers(1, 7), st.data())
def test_k_of_n_is_what_counting_all_choices_gives(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(any(choice) for choice in choices))
    assert pass_hat_k(n, c, k) == pytest.approx(statistics.fmean(all(choice) for choice in choices))


def test_the_headline_numbers():
    found = metrics(rows(a="1111", b="1100", c="0000"))
    assert found["pass_at_1"]["value"] == found["pass_hat_k"]["1"]["value"] == 0.5
    assert found["pass_at_k"]["2"]["value"] == pytest.approx((1 + (1 - 1 / 6) + 0) / 3, abs=1e-6)
    assert found["pass_hat_k"]["4"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert list(found["pass_hat_k"]) == ["1", "2", "3", "4"]


def test_more_trials_of_the_same_tasks_do_not_narrow_the_interval():
    once = rows(**{f"t{i}": "1" if i % 3 else "0" for i in range(30)})
    often = rows(**{f"t{i}": ("1" if i % 3 else "0") * 10 for i in range(30)})
    assert metrics(once)["pass_at_1"] == metrics(often)["pass_at_1"]


def test_the_interval_is_about_two_standard_errors_wide():
    values = [float(i % 2) for i in range(100)]
    found = estimate(values)
    assert (
        found.value == 0.5 and found.low == pytest.approx(0.4, abs=0.02) and found.high == pytest.approx(0.6, abs=0.02)
    )
    assert estimate(values) == found


@pytest.mark.parametrize("n", [2, 10, 40])
def test_where_all_tasks_agree_the_exact_bound_stands(n):
    none, all_of_them = estimate([0.0] * n), estimate([1.0] * n)
    assert none.low == 0 and all_of_them.high == 1
    assert all_of_them.low**n == pytest.approx(0.025) and none.high == pytest.approx(1 - all_of_them.low)


def test_equal_values_between_the_ends_tell_no_interval():
    found = metrics(rows(a="10", b="01", c="10"))
    assert found["pass_at_1"] == {"value": 0.5, "low": None, "high": None}
    assert found["pass_at_k"]["2"]["low"] is not None, "all 1: the exact bound"


def test_a_single_task_has_no_interval():
    assert metrics(rows(a="10"))["pass_at_1"] == {"value": 0.5, "low": None, "high": None}


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """40 tasks of pass chance 0.6, drawn 300 times."""
    import random

    rng = random.Random(1)
    hits = 0
    for _ in range(300):
        found = estimate([float(rng.random() < 0.6) for _ in range(40)])
        hits += found.low <= 0.6 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


# ---------------------------------------------------------------------------------------------------------------------


def test_every_telecom_task_names_its_faults_and_its_persona():
    tasks = load_tasks("telecom", "base")
    assert {persona(task.id) for task in tasks} == {"None", "Easy", "Hard"}
    assert all(1 <= len(sub_issues(task.id)) <= 9 for task in tasks)
    assert sub_issues("[mms_issue]bad_vpn|airplane_mode_on[PERSONA:Easy]") == ["bad_vpn", "airplane_mode_on"]
    assert sub_issues("17") == [] and persona("17") is None


def test_groups_hold_every_episode_once():
    episodes = [
        {**row, "issue_type": "mms_issue", "task_id": f"[mms_issue]bad_vpn|x[PERSONA:{row['task_id']}]"}
        for row in rows(Easy="10", Hard="00")
    ]
    found = breakdowns(episodes)
    assert found["by_issue_type"]["mms_issue"]["total"] == 4 and found["by_issue_type"]["mms_issue"]["tasks"] == 2
    assert found["by_sub_issues"]["2"]["successes"] == 1
    assert {name: group["pass_at_1"] for name, group in found["by_persona"].items()} == {"Easy": 0.5, "Hard": 0.0}
    assert breakdowns([{**row, "issue_type": "other"} for row in rows(a="1", b="0")])["by_persona"] == {}


def test_behaviour_adds_up():
    common = {"steps": 4, "agent_turns": 2, "tool_errors": 0, "customer_tool_calls": 1}
    found = behaviour(
        [
            {**common, "end_reason": "user_stop", "tokens": {"prompt": 3}},
            {**common, "end_reason": "max_steps", "tokens": {"prompt": 4, "generated": 1}},
        ]
    )
    assert found["tokens"] == {"prompt": 7, "generated": 1} and found["avg_customer_tool_calls"] == 1
    assert found["end_reasons"] == {"user_stop": 1, "max_steps": 1}


# ---------------------------------------------------------------------------------------------------------------------

outcomes = st.dictionaries(st.sampled_from("abcdefgh"), st.text("01", min_size=2, max_size=2), min_size=2)


@settings(max_examples=20)
@given(outcomes, outcomes)
def test_a_difference_turns_its_sign_with_the_order(one, other):
    if not set(one) & set(other):
        with pytest.raises(ValueError):
            paired_difference(rows(**one), rows(**other), "solved")
        return
    there = paired_difference(rows(**one), rows(**other), "solved")
    back = paired_difference(rows(**other), rows(**one), "solved")
    assert there.value == pytest.approx(-back.value) and there.p == pytest.approx(back.p, abs=0.03)
    assert there.told_apart == back.told_apart or abs(there.p - 0.05) < 0.03
    assert len(flips(rows(**one), rows(**other))) == len(flips(rows(**other), rows(**one)))


def test_a_run_does_not_differ_from_itself():
    found = paired_difference(rows(a="10", b="01"), rows(a="10", b="01"), "solved")
    assert (found.value, found.p, found.told_apart, found.needed) == (0, 1.0, False, None)


def changed(n_up, n=40):
    before = rows(**{f"t{i}": "0" for i in range(n)})
    return before, rows(**{f"t{i}": "1" if i < n_up else "0" for i in range(n)})


def test_a_few_flips_are_no_difference_though_the_bootstrap_would_say_so():
    four, eight = paired_difference(*changed(4), "solved"), paired_difference(*changed(8), "solved")
    assert four.low > 0 and four.p == pytest.approx(2 / 2**4, abs=0.02) and not four.told_apart
    assert eight.p == pytest.approx(2 / 2**8, abs=0.01) and eight.told_apart
    assert four.needed > 40 and eight.detectable > 0


def test_flips_name_the_largest_change_first():
    found = flips(rows(a="111", b="000", c="100"), rows(a="110", b="111", c="100"))
    assert [(flip["task_id"], flip["a"], flip["b"]) for flip in found] == [("b", 0, 3), ("a", 3, 2)]
    assert found[0]["trials"] == 3


def test_task_means_are_over_trials():
    assert task_means(rows(a="10", b="11"), "solved") == [0.5, 1.0]
    assert list(by_task(rows(a="10", b="11"))) == ["a", "b"]
