"""Moods of the scripted customer: the listening teacher copes with each, an agent that recites does not."""

import asyncio
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate_tau2
import generate_with_tau
import sensitivity
import tau2_moods
import teacher_traces
from tau2_domains import load_tasks
from tau2_episode import AgentTurn, EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_mock import write_jsonl
from tau2_moods import CHOICES, MOODS, PERSONA_MOODS, make_mood
from tau2_settings import read_settings
from tau2_teacher import STYLES, WORDINGS, AlwaysTransfer, ScriptedTeacher, _please, hear, run_split
from tau2_understanding import parse
from tau2_users import ScriptedCustomer

HARD = MOODS[1:]
TEST, TRAIN = load_tasks("telecom", "test"), load_tasks("telecom", "train")
EXAMPLE = Path(sensitivity.__file__).parent


def config(mood: str, **settings) -> EpisodeConfig:
    return EpisodeConfig(prompt="short", user_args={"mood": mood}, **settings)


def play(make, tasks, mood: str, seed: int = 0) -> list:
    """One episode per task; make(task): its agent."""

    async def run():
        return [await run_episode(task, make(task), config(mood), seed) for task in tasks]

    return asyncio.run(run())


def solved(episodes) -> float:
    return sum(episode.solved for episode in episodes) / len(episodes)


def customer_said(episode) -> list[str]:
    return [m.content for m in episode.simulation.messages if m.role == "user" and not m.tool_calls]


# -- the plain customer ----------------------------------------------------------------------------------------------


def test_the_plain_customer_is_what_it_was_and_named_so_only_as_before():
    (named,) = play(lambda task: ScriptedTeacher(), TEST[:1], "plain")
    unnamed = asyncio.run(run_episode(TEST[0], ScriptedTeacher(), EpisodeConfig(prompt="short")))
    assert named.user == unnamed.user == {"kind": "scripted", "version": "3"}
    assert named.messages == unnamed.messages


def test_the_plain_customers_words_reach_the_teacher_unchanged():
    for episode in play(lambda task: ScriptedTeacher(), TEST[::5], "plain"):
        assert [hear(text) for text in customer_said(episode)] == [text.lower() for text in customer_said(episode)]


# -- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mood", [*HARD, "persona", "mixed"])
def test_the_teacher_solves_the_tasks_of_every_mood(mood):
    for style in STYLES:
        episodes = play(lambda task, style=style: ScriptedTeacher(style), TEST[::3], mood)
        assert [e.task_id for e in episodes if not e.solved] == []


@pytest.mark.slow
@pytest.mark.parametrize("mood", [*HARD, "persona", "mixed"])
@pytest.mark.parametrize("style", STYLES)
def test_the_teacher_solves_95_percent_of_every_split(mood, style):
    for split in ("train", "test", "full"):
        episodes = asyncio.run(run_split(functools.partial(ScriptedTeacher, style), split, config(mood)))
        assert solved(episodes) >= 0.95


FIXES = [
    "turn airplane mode off",
    "re-seat your SIM card",
    "turn mobile data on",
    "turn roaming on",
    "turn Data Saver off",
    "set network mode to 5G",
    "disconnect the VPN",
    "turn Wi-Fi calling off",
    "grant the SMS permission",
    "grant the storage permission",
    "reset your APN settings",
    "restart your phone",
    "run a speed test",
    "try an MMS",
]


@pytest.mark.parametrize("wording", range(1, len(WORDINGS)))
def test_every_wording_asks_for_the_same(wording):
    def asked(text, wording):
        return Counter((r.key, bool(r.condition)) for r in parse(ScriptedTeacher(wording=wording)._worded(text)))

    sentences = [_please([fix]) for fix in FIXES] + [_please(FIXES), _please(FIXES[::-1])]
    sentences += [f"For your MMS problem, where needed, {_please(FIXES[:-1]).replace('P', 'p', 1)}"]
    sentences += ["Please check your network status, Data Saver, network mode and VPN."]
    sentences += ["Please check your network status, network mode, messaging permissions and APN settings."]
    sentences += ["I sent a payment request of $65.5. Please check it and pay it.", "What is your phone number?"]
    sentences += ["Your data is used up. May I refuel 2 GB for $4.00?"]
    for sentence in sentences:
        assert asked(sentence, wording) == asked(sentence, 0), ScriptedTeacher(wording=wording)._worded(sentence)


@pytest.mark.parametrize("wording", range(1, len(WORDINGS)))
def test_every_wording_solves_under_every_mood(wording):
    for number, mood in enumerate(MOODS):
        for style in STYLES:
            tasks = [*TEST[number::13], *TRAIN[number::40]]
            episodes = play(lambda task, style=style: ScriptedTeacher(style, wording=wording), tasks, mood)
            assert [e.task_id for e in episodes if not e.solved] == [], (mood, style)


# -- reciting --------------------------------------------------------------------------------------------------------


class Recites:
    """The turns, by heart, with which the teacher solved this very task for the plain customer."""

    def __init__(self, turns: list[AgentTurn]) -> None:
        self.turns = iter(turns)

    async def start(self, messages, tools) -> None:
        pass

    async def act(self, new_messages) -> AgentTurn:
        return next(self.turns, AgentTurn(content="Okay."))


class Records(ScriptedTeacher):
    async def act(self, new_messages) -> AgentTurn:
        self.said = [*getattr(self, "said", []), await super().act(new_messages)]
        return self.said[-1]


@functools.cache
def by_heart(style: str) -> dict[str, list[AgentTurn]]:
    teachers = {task.id: Records(style) for task in TEST}
    assert solved(play(lambda task: teachers[task.id], TEST, "plain")) == 1.0
    return {task_id: teacher.said for task_id, teacher in teachers.items()}


@pytest.mark.parametrize("style", STYLES)
def test_reciting_is_not_enough(style):
    tasks, heart = TEST[::2], by_heart(style)
    found = {mood: solved(play(lambda task: Recites(heart[task.id]), tasks, mood)) for mood in MOODS}
    assert found["plain"] == 1.0
    assert found["asks_back"] <= 0.75, found
    assert sum(found[mood] for mood in HARD) / len(HARD) < 0.95, found
    if style == "checklist":  # whoever knows the faults by heart does not mind a setting that is reported wrongly
        assert found["misreads"] <= 0.85, found


class HearsNothing(ScriptedTeacher):
    """The teacher before it learned to listen: the plain customer's words only, and never a second time."""

    def _more(self, said, text):
        return ""


def test_a_teacher_without_its_ears_does_clearly_worse(monkeypatch):
    monkeypatch.setattr("tau2_teacher._HEARD", [])
    found = {mood: solved(play(lambda task: HearsNothing("checklist"), TEST[::2], mood)) for mood in MOODS}
    assert found["plain"] == 1.0
    assert sum(found[mood] for mood in HARD) / len(HARD) < 0.9, found


def test_always_transfer_stays_at_its_floor():
    for mood in [*HARD, "mixed"]:
        assert solved(play(lambda task: AlwaysTransfer(), TEST, mood)) == pytest.approx(0.30)


# -- what each mood does ---------------------------------------------------------------------------------------------


class Says:
    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    async def start(self, messages, tools) -> None:
        pass

    async def act(self, new_messages) -> AgentTurn:
        return AgentTurn(content=self.texts.pop(0) if self.texts else "Okay.")


def dialogue(mood: str, part: str, *texts: str) -> tuple[list[str], list[str]]:
    """(what the customer said, opening first; names of its phone actions)."""
    task = next(t for t in load_tasks("telecom", "full") if part in t.id)
    (episode,) = play(lambda task: Says(*texts), [task], mood)
    done = [c.name for m in episode.simulation.messages if m.role == "user" for c in m.tool_calls or []]
    return customer_said(episode), done


def test_terse_says_only_what_was_asked():
    said, _ = dialogue("terse", "|user_abroad_roaming", "What is your phone number?", "Check network status.")
    assert "555" not in said[0] and "abroad" not in said[0]
    assert "555-123-2002" in said[1] and "abroad" not in said[1]
    assert "roaming" not in said[2] and "data" not in said[2]


def test_rambling_names_numbers_that_are_no_customers():
    for task in TEST[::4]:
        customer = ScriptedCustomer(task.user_scenario, make_mood("rambling", task.id, 0))
        opening = customer.mood.opening(customer.scenario)
        numbers = tau2_moods.re.findall(r"\d{3}-\d{3}-\d{4}", opening)
        assert len(numbers) == 2 and sum(number.startswith("555-") for number in numbers) == 1


def test_asks_back_before_it_does_anything_and_then_does_it_all():
    request = "Please turn airplane mode off, then re-seat your SIM card."
    for answer in (request, "You find airplane mode in the settings."):
        said, done = dialogue("asks_back", "[service_issue]airplane_mode_on|unseat_sim_card[", request, answer)
        assert said[1].endswith("?") and "airplane mode" in said[1]
        assert done.count("toggle_airplane_mode") == done.count("reseat_sim_card") == 1 and "###STOP###" in said[2]
    said, done = dialogue("asks_back", "[service_issue]airplane_mode_on|unseat_sim_card[", request, "I see.", "Hm.")
    assert done == []


def test_an_explanation_that_sounds_like_another_request_explains():
    request = "Please turn mobile data on, then run a speed test."
    path = "Open Settings, tap Mobile network, check the SIM, and flip the switch."
    _, done = dialogue("asks_back", "[mobile_data_issue]data_mode_off[", request, path)
    assert done.count("toggle_data") == 1
    _, done = dialogue("asks_back", "[mobile_data_issue]data_mode_off[", request, "Reset your APN settings.")
    assert "toggle_data" not in done


def test_a_misread_setting_is_read_rightly_the_next_time():
    check = "Please check Data Saver."
    said, _ = dialogue("misreads", "[mobile_data_issue]data_saver_mode_on[", check, check)
    assert said[1] == "Data Saver is off." and said[2] == "Data Saver is on, I misread that before."


def test_a_mixed_up_switch_is_told_and_put_back():
    request = "Please turn Data Saver off."
    said, done = dialogue("misreads", "[mobile_data_issue]data_saver_mode_on[", request, request, "Run a speed test.")
    assert said[1] == "I flipped Wi-Fi instead of Data Saver and put it back."
    assert done.count("toggle_wifi") == 2 and done.count("toggle_data_saver_mode") == 1 and "###STOP###" in said[3]


def test_what_an_eager_customer_does_it_says():
    for seed in range(4):
        (episode,) = play(lambda task: ScriptedTeacher(), [TEST[0]], "eager", seed)
        done = [c.name for m in episode.simulation.messages if m.role == "user" for c in m.tool_calls or []]
        text = " ".join(customer_said(episode))
        assert ("connect_vpn" in done) == ("I also turned the VPN on" in text)


@pytest.mark.parametrize("mood", [*HARD, "persona", "mixed"])
def test_the_same_task_and_seed_give_the_same_dialogue(mood):
    runs = [play(lambda task: ScriptedTeacher(), TEST[:8:4], mood, seed) for seed in (1, 1, 2, 3, 4)]
    first, second, *others = [[e.messages for e in episodes] for episodes in runs]
    assert first == second and any(other != first for other in others)


def test_no_draw_depends_on_pythons_hash_seed():
    code = (
        "from types import SimpleNamespace as S; from tau2_moods import *\n"
        "s = S(issue='mms', name='A B', phone='555-1', location='abroad', abroad=True)\n"
        "for m in CHOICES[1:]:\n"
        "    print('\\n'.join(make_mood(m, f't{i}[PERSONA:Hard]', i).opening(s) for i in range(9)))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(EXAMPLE), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] and len(set(outputs[0].splitlines())) > 20


def test_persona_and_mixed_draw_by_their_rules():
    for persona, moods in PERSONA_MOODS.items():
        names = {make_mood("persona", f"[x]y[PERSONA:{persona}]", seed).name for seed in range(20)}
        assert names == set(moods)
    drawn = Counter(make_mood("mixed", task.id, 0).name for task in TRAIN)
    assert set(drawn) == set(MOODS) and min(drawn.values()) >= 4
    record = make_mood("mixed", TRAIN[0].id, 0).describe()
    assert record["mood"] == "mixed" and record["drawn"] in MOODS and record["mood_version"]


# -- entry points ----------------------------------------------------------------------------------------------------

WRONG = [{"mood": "sad"}, {"mood": ["terse"]}, {"temper": "x"}, {"mood": "terse", "timeout": 3}]


@pytest.mark.parametrize("user_args", WRONG)
def test_unknown_moods_and_settings_are_refused_everywhere(user_args, tmp_path, capsys):
    given = ["--user-args", json.dumps(user_args)]
    assert evaluate_tau2.main(["--agent", "teacher", "--output-path", str(tmp_path / "a.json"), *given]) == 2
    assert teacher_traces.main(["--local_dir", str(tmp_path), *given]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("mood" in line for line in told) and list(tmp_path.iterdir()) == []
    if "mood" in user_args and len(user_args) == 1:
        assert all(f"choose one of: {', '.join(CHOICES)}" in line for line in told)
    with pytest.raises(BadInput, match="mood"):
        generate_with_tau.check_args(SimpleNamespace(tau2_user_args=user_args))


def test_the_settings_of_a_rollout_name_the_mood():
    args = SimpleNamespace(tau2_user_args={"mood": "rambling"})
    generate_with_tau.check_args(args)
    assert generate_with_tau.episode_config(read_settings(args), {}).user_args == {"mood": "rambling"}


def test_traces_of_moods_and_wordings(tmp_path):
    tasks = [json.loads(task.model_dump_json()) for task in TRAIN[:4]]
    rows = [{"index": i, "metadata": {"split": "train", "task": task}} for i, task in enumerate(tasks)]
    write_jsonl(tmp_path / "telecom_train_tasks.jsonl", rows)
    flags = ["--local_dir", str(tmp_path), "--prompt", "short", "--epochs", "3", "--wordings", "4"]
    flags += ["--user-args", '{"mood": "mixed"}']
    written = []
    for name in ("a.jsonl", "b.jsonl"):
        assert teacher_traces.main([*flags, "--output", str(tmp_path / name)]) == 0
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    traces = [json.loads(line) for line in written[0].splitlines()]
    assert {t["metadata"]["user"]["mood"] for t in traces} == {"mixed"}
    assert len({t["metadata"]["user"]["drawn"] for t in traces}) > 2
    asked = [m["content"] for t in traces for m in t["prompt"] if m["role"] == "assistant" and m["content"]]
    assert len({text.split()[0] for text in asked}) > 2
    with pytest.raises(SystemExit, match="2"):
        teacher_traces.main([*flags, "--wordings", "5"])


def test_the_sensitivity_table(tmp_path, capsys):
    out = tmp_path / "moods"
    flags = ["--agent", "teacher", "--prompt", "short", "--num-tasks", "3", "--output-dir", str(out)]
    assert sensitivity.main([*flags, "--moods", "terse", "mixed"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if "1.000 [" in line and "floor" not in line][-3:] == [
        "plain",
        "terse",
        "mixed",
    ]
    found = json.loads((out / "sensitivity.json").read_text())["moods"]
    assert [row["mood"] for row in found] == ["plain", "terse", "mixed"]
    assert (
        found[0]["difference"] is None
        and found[1]["difference"]["value"] == 0.0
        and found[1]["difference"]["tasks"] == 3
    )
    assert found[0]["customer"] == {"kind": "scripted", "version": "3"}
    assert found[2]["customer"] == {"kind": "scripted", "version": "3", "mood": "mixed", "mood_version": "2"}
    rows = (out / "terse.rows.jsonl").read_text()
    assert sensitivity.main([*flags, "--moods", "terse", "mixed"]) == 0
    assert (out / "terse.rows.jsonl").read_text() == rows
    capsys.readouterr()
    assert evaluate_tau2.main(["compare", str(out / "plain.json"), str(out / "terse.json")]) == 2
    assert "'mood': 'terse'" in capsys.readouterr().err


def test_compare_refuses_another_version_of_the_same_customer(tmp_path, capsys):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    flags = ["--agent", "teacher", "--prompt", "short", "--num-tasks", "1", "--user-args", '{"mood": "eager"}']
    assert evaluate_tau2.main([*flags, "--output-path", str(path)]) == 0
    result = json.loads(path.read_text())
    result["customer"]["mood_version"] = "0"
    other.write_text(json.dumps(result))
    assert evaluate_tau2.main(["compare", str(path), str(other)]) == 2
    assert "mood_version" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--moods", "sad"], "unknown mood 'sad'; choose among: plain, terse"),
        (["--user-args", "{}"], "--user-args is set here for each mood"),
        (["--user=llm"], "--user is set here"),
        (["--num-trials", "0"], "--num-trials must be at least 1"),
    ],
)
def test_wrong_commands_of_the_sensitivity_table(flags, told, tmp_path, capsys):
    assert sensitivity.main(["--agent", "teacher", "--output-dir", str(tmp_path / "out"), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_a_terse_customer_names_an_apn_that_is_broken():
    terse = make_mood("terse", "task", 0)
    assert terse.words(["APN is broken, MMSC is set"], True) == ["APN broken, MMSC ok"]
    assert terse.words(["APN is internet, MMSC is not set"], True) == ["no MMSC"]
