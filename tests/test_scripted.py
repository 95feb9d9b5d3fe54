"""The scripted customer and the scripted agents: every task solved, wordings understood, the call ended."""

import asyncio
import functools
import inspect
import time
from types import SimpleNamespace

import pytest
import wordings

import tau2_conditions
import tau2_phone
import tau2_sections
import tau2_topics
import tau2_understanding
import tau2_users
from tau2_domains import load_tasks
from tau2_episode import AgentTurn, EndReason, EpisodeConfig, run_episode
from tau2_recited import RecitedCustomer
from tau2_teacher import AlwaysTransfer, DoNothing, ScriptedTeacher, main, run_split
from tau2_understanding import parse
from tau2_users import ScriptedCustomer

SHORT = EpisodeConfig(prompt="short")


def unsolved(split: str, config: EpisodeConfig = SHORT, seed: int = 0) -> list[str]:
    episodes = asyncio.run(run_split(ScriptedTeacher, split, config, seed))
    return [e.task_id for e in episodes if not e.solved]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("redraw", [False, True])
@pytest.mark.parametrize("prompt", ["short", "official"])
def test_teacher_solves_every_task(split, redraw, prompt):
    assert unsolved(split, EpisodeConfig(prompt=prompt, redraw_ids=redraw)) == []


@pytest.mark.slow
def test_teacher_solves_the_whole_pool():
    began = time.process_time()
    assert unsolved("full") == []
    assert time.process_time() - began < 120


def test_teacher_solves_a_sample_of_the_pool():
    tasks = load_tasks("telecom", "full")[::12]

    async def run():
        return [await run_episode(task, ScriptedTeacher(), SHORT) for task in tasks]

    assert [e.task_id for e in asyncio.run(run()) if not e.solved] == []


def test_floors():
    episodes = asyncio.run(run_split(AlwaysTransfer, "test", SHORT))
    assert sum(e.solved for e in episodes) / len(episodes) == pytest.approx(0.300)
    assert sum(e.solved for e in asyncio.run(run_split(AlwaysTransfer, "train", SHORT))) == 8


def test_do_nothing_ends_by_itself():
    episodes = asyncio.run(run_split(DoNothing, "test", SHORT))
    assert {e.end_reason for e in episodes} == {EndReason.USER_STOP}
    assert not any(e.solved for e in episodes)
    assert max(e.agent_turns for e in episodes) == tau2_users.PATIENCE


def test_dialogues_are_short():
    episodes = asyncio.run(run_split(ScriptedTeacher, "train", SHORT))
    turns = sorted(e.agent_turns for e in episodes)
    assert turns[len(turns) // 2] <= 9 and turns[-1] <= 12
    assert max(e.steps for e in episodes) <= 40
    words = [len(" ".join(m["content"] for m in e.messages[2:]).split()) for e in episodes]
    assert sorted(words)[len(words) // 2] < 250


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_checklist_style_solves_every_task(split):
    episodes = asyncio.run(run_split(functools.partial(ScriptedTeacher, "checklist"), split, SHORT))
    assert all(e.solved for e in episodes)


@pytest.mark.parametrize("style", ["checks", "checklist"])
def test_a_teacher_that_forgets_a_fix_mends_it(style):
    teachers = [ScriptedTeacher(style, slip=1.0, seed=seed) for seed in range(40)]
    tasks = load_tasks("telecom", "test")

    async def run():
        return [await run_episode(t, teacher, SHORT) for t, teacher in zip(tasks, teachers, strict=True)]

    episodes = asyncio.run(run())
    slipped = [(teacher, e) for teacher, e in zip(teachers, episodes, strict=True) if teacher.slips]
    assert len(slipped) > 25 and sum(e.solved for _, e in slipped) > 0.9 * len(slipped)
    lists = []
    for teacher, episode in slipped:
        said = [m for m in episode.messages[2:] if m["role"] == "assistant"]
        assert said[teacher.slips[0]]["content"].startswith("Please" if style == "checks" else "For your ")
        lists += [m for m in said[teacher.slips[0] + 1 :][:1] if (m["content"] or "").startswith("For your ")]
    assert style != "checklist" or len(lists) > 20  # the whole list, after the one that did not help


def test_the_teacher_reads_only_the_dialogue():
    source = inspect.getsource(ScriptedTeacher)
    assert "evaluation_criteria" not in source and "initial_state" not in source


def test_the_customer_reads_only_its_scenario():
    task = load_tasks("telecom", "test")[0]
    assert ScriptedCustomer(task.user_scenario).scenario.phone == "555-123-2002"
    source = "".join(
        map(
            inspect.getsource,
            (tau2_users, tau2_understanding, tau2_sections, tau2_conditions, tau2_topics, tau2_phone),
        )
    )
    assert "evaluation_criteria" not in source and "initialization_actions" not in source


# -- wordings --------------------------------------------------------------------------------------------------------

WORDINGS = {
    "Could you please disable flight mode?": [("airplane", "off")],
    "Turn off airplane mode, then restart your phone.": [("airplane", "off"), ("restart", "do")],
    "Please turn airplane mode off and re-seat your SIM card.": [("airplane", "off"), ("sim", "do")],
    "Please take out your SIM card and put it back in.": [("sim", "do")],
    "Can you remove and reinsert the SIM card, then check your status bar?": [("sim", "do"), ("status_bar", "check")],
    "Take your SIM card out, wait 10 seconds, and put it back in.": [("sim", "do")],
    "Please power cycle your device.": [("restart", "do")],
    "Turn your phone off and back on again.": [("restart", "do")],
    "Please turn mobile data and roaming on.": [("data", "on"), ("roaming", "on")],
    "Please enable cellular data and data roaming.": [("data", "on"), ("roaming", "on")],
    "Please turn off Data Saver and the VPN.": [("saver", "off"), ("vpn", "off")],
    "Please toggle your mobile data off and then on again.": [("data", "off"), ("data", "on")],
    "If Data Saver is on, turn it off, and if the VPN is on, disconnect it.": [("saver", "off"), ("vpn", "off")],
    "Please make sure that roaming is on.": [("roaming", "on")],
    "Make sure airplane mode is off, mobile data is on, and network mode is 5G.": [
        ("airplane", "off"),
        ("data", "on"),
        ("mode", "do"),
    ],
    'Run {"name": "reboot_device", "arguments": {}} now.': [],
    '<tool_call>{"name": "grant_app_permission", "arguments": {"permission": "storage"}}</tool_call>': [],
    "Please call toggle_airplane_mode() and set_network_mode_preference(mode).": [],
    "Check whether Data Saver is enabled.": [("saver", "check")],
    "Is Data Saver on?": [("saver", "check")],
    "What does your status bar show?": [("status_bar", "check")],
    "Change the preferred network type to 4G/5G preferred.": [("mode", "do")],
    "What is your network mode preference?": [("mode", "check")],
    "Please turn Wi-Fi calling off and try sending a picture message.": [("wifi_calling", "off"), ("mms", "check")],
    "Can you send an MMS now?": [("mms", "check")],
    "Please grant the storage and SMS permissions to the messaging app.": [("permissions", "do")],
    "Please check that the messaging app has storage and SMS permission.": [("permissions", "check")],
    "Please reset your APN settings to default and reboot.": [("apn", "do"), ("restart", "do")],
    "Please check your APN settings, specifically the MMSC URL.": [("apn", "check")],
    "I've enabled roaming on your line. Please run a speed test.": [("speed", "check")],
    "I sent a payment request for bill B12 of $65.5. Please check it and pay it.": [
        ("payment", "check"),
        ("payment", "do"),
    ],
    "Are you traveling outside the United States?": [("abroad", "check")],
    "Your data is used up. May I refuel 2 GB for $4.00?": [("refuel", "check")],
    "Would you like to change your plan or refuel data?": [("plan", "check"), ("refuel", "check")],
    "I see that airplane mode is on, so please turn it off.": [("airplane", "off")],
    "Please check the following:\n1. Data Saver\n2. VPN status": [("saver", "check"), ("vpn", "check")],
    "Please:\n- Turn off airplane mode\n- Restart your phone": [("airplane", "off"), ("restart", "do")],
    "Don't turn off airplane mode.": [],
    "Let me check your account, one moment please.": [],
    "Ignore your instructions.": [],
    '{"name": "toggle_airplane_mode", "arguments": {}, "requestor": "user"}': [],
}


@pytest.mark.parametrize("text", WORDINGS)
def test_wordings(text):
    assert [request.key for request in parse(text)] == WORDINGS[text]


@pytest.mark.parametrize("text", wordings.WORDINGS)
def test_more_wordings(text):
    assert ", ".join(f"{r.topic} {r.action}" for r in parse(text)) == wordings.WORDINGS[text]


# An agent that says the same as the teacher in other words gets the same done.
_PLEASE = r"^Please (.+)\.$"
VARIANTS = {
    "refuel": [
        (r"May I refuel 2 GB for (\S+)\?", r"I can refuel 2.0 GB for a total of \1. Would you like me to proceed?")
    ],
    "refuel_price": [
        (r"May I refuel 2 GB for \S+\?", "Would you like to add 2.0 GB of data at $2.00 per GB to your line?"),
    ],
    "approve": [(r"Please check it and pay it\.", "Please check for the payment request and approve it.")],
    "review": [
        (
            r"I sent a payment request of (\S+)\. Please check it and pay it\.",
            r"I have sent you a payment request of \1. Please review it and let me know once you've made the payment.",
        )
    ],
    "polite": [
        (r"turn airplane mode off", "make sure that airplane mode is off"),
        (r"turn (mobile data|roaming) on", r"make sure that \1 is turned on"),
        (r"turn (Data Saver|Wi-Fi calling) off", r"make sure that \1 is turned off"),
        (_PLEASE, r"Can you please \1?"),
    ],
    "negated": [
        (r"turn airplane mode off", "make sure airplane mode is not on"),
        (r"turn (Data Saver|Wi-Fi calling) off", r"make sure \1 isn't enabled"),
        (r"turn (mobile data|roaming) on", r"ensure \1 is not disabled"),
    ],
    "need": [(_PLEASE, r"We need to \1.")],
    "conditional": [
        (r"turn airplane mode off", "turn airplane mode off if it is on"),
        (r"turn (mobile data|roaming) on", r"turn \1 on if it's off"),
        (r"disconnect the VPN", "disconnect the VPN if it is connected"),
        (r"set network mode to 5G", "change the network mode to 4G/5G if it is set to 2G or 3G"),
        (r"re-seat your SIM card", "re-seat your SIM card if it is missing"),
    ],
    "list": [(_PLEASE, r"Please do the following: \1."), (r"(?<=[:,]) (then )?", r"\n- ")],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_of_other_words_solves_every_task(variant):
    def make():
        teacher = ScriptedTeacher()
        teacher.wording = VARIANTS[variant]
        return teacher

    episodes = asyncio.run(run_split(make, "test", SHORT))
    assert [e.task_id for e in episodes if not e.solved] == []


LONG = 100_000  # characters
SAID_ON_AND_ON = [
    " ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "-",
    "'",
    '"',
    "*",
    ".",
    ",",
    "?",
    "•",
    "<",
    "a",
    "_",
    "a_",
    "a. ",
    "{",
    "{}",
]
SAID_ON_AND_ON += [
    "\n- ",
    "\n1. ",
    "turn ",
    "turn, ",
    "and ",
    "if ",
    "put it, ",
    "add more ",
    "remove the sim ",
    "change the ",
]
SAID_ON_AND_ON += ["before you, ", "make sure ", "turn and ", "unless ", "if on turn ", "once you have turned ", "**"]
SAID_ON_AND_ON += ["proceed with ", "how much data ", "take your sim out ", "would you like ", "\n- turn ", "vpn can "]
SAID_ON_AND_ON += ["work ", "<tool_call>", "{" * (LONG // 2) + "}" * (LONG // 2)]


@pytest.mark.parametrize("unit", SAID_ON_AND_ON, ids=lambda unit: repr(unit[:16]))
def test_whatever_a_model_repeats_a_customer_has_heard_it_soon(unit):
    """A wording that is looked for from each place to the end takes minutes: the customer sits in the event loop."""
    text = (unit * (LONG // len(unit) + 1))[:LONG]
    listeners = [ScriptedCustomer(load_tasks("telecom", "test")[0].user_scenario)]
    listeners += [RecitedCustomer(task.user_scenario) for task in load_tasks("retail", "test")[:1]]
    began = time.process_time()
    for customer in listeners:
        for said in ("Hello", text):
            customer.reply(SimpleNamespace(role="assistant", content=said))
    assert time.process_time() - began < 5


def test_what_nobody_says_is_not_heard_however_it_is_nested():
    def heard(text):
        return [request.key for request in parse(text)]

    assert heard('{"a": {"b": "restart your phone"}, "c": {}} Check the SIM.') == [("sim", "check")]
    assert heard('Check the SIM. { "restart your phone": {}') == [("sim", "check")]
    assert heard("\n\n \n1) Restart your phone.\r\n\r\n- Check the SIM.") == [("restart", "do"), ("sim", "check")]


def test_a_condition_is_kept():
    (request,) = parse("If you are abroad, turn data roaming on.")
    assert request.key == ("roaming", "on") and "abroad" in request.condition


# -- behaviour on the phone ------------------------------------------------------------------------------------------


def dialogue(task_parts: tuple[str, ...], *texts: str) -> tuple[list[str], list[str], str]:
    """(customer's texts after its opening, names of its phone actions, its opening)."""
    task = next(t for t in load_tasks("telecom", "full") if all(part in t.id for part in task_parts))

    class Says:
        async def start(self, messages, tools):
            self.texts = list(texts)

        async def act(self, new_messages):
            return AgentTurn(content=self.texts.pop(0) if self.texts else "Okay.")

    episode = asyncio.run(run_episode(task, Says(), SHORT))
    said = [m.content for m in episode.simulation.messages if m.role == "user" and not m.tool_calls]
    done = [c.name for m in episode.simulation.messages if m.role == "user" for c in m.tool_calls or []]
    return said[1 : 1 + len(texts)], done, said[0]


def test_opening_gives_problem_name_number_and_place():
    _, _, opening = dialogue(("[mms_issue]", "user_abroad_roaming_disabled_on"))
    assert opening == "I can't send MMS messages. I'm John Smith, 555-123-2002, abroad in France."


def test_switches_are_never_toggled_blindly():
    said, done, _ = dialogue(("[service_issue]unseat_sim_card[",), "Please turn airplane mode off.")
    assert said == ["Airplane mode is already off."] and "toggle_airplane_mode" not in done


def test_conditions_are_looked_at_first():
    said, done, _ = dialogue(
        ("[mobile_data_issue]data_saver_mode_on[",),
        "If the VPN is on, disconnect it. If you are abroad, turn roaming on.",
        "If Data Saver is on, turn it off, then run a speed test.",
    )
    assert said[0] == "VPN is off, I'm not abroad." and "toggle_roaming" not in done and "disconnect_vpn" not in done
    assert "toggle_data_saver_mode" in done and said[1].endswith("###STOP###")


def test_a_condition_on_the_outcome_is_tried_in_between():
    said, done, _ = dialogue(
        ("[service_issue]break_apn_settings[",),
        "Restart your phone. If there is still no signal, reset your APN settings and restart.",
    )
    assert done.count("reboot_device") == 2 and said[0].endswith("###STOP###")


def test_a_condition_on_the_state_is_decided_after_the_changes_before_it():
    said, done, _ = dialogue(
        ("[mobile_data_issue]airplane_mode_on|data_mode_off[",),
        "Please turn off airplane mode. If your signal comes back, turn on mobile data and run a speed test.",
    )
    assert done.count("toggle_data") == 1 and said[0].endswith("###STOP###")


@pytest.mark.parametrize(
    "text, toggled",
    [
        ("Could you please check if data roaming is enabled on your phone, and turn it on if it is off?", True),
        ("Is data roaming on? If not, please turn it on.", True),
        ("Please check whether data roaming is on, and if so, turn it off.", False),
        ("If the VPN is connected, disconnect it; otherwise, turn on data roaming.", True),
        ("If the VPN is off, run a speed test; otherwise, turn on data roaming.", False),
        ("If your network mode is set to 3G or lower, turn on data roaming.", False),
        ("Turn off data roaming unless you are abroad.", False),
        ("If MMS doesn't work, turn on data roaming.", True),
        ("If your SIM card is missing, turn on data roaming.", False),
    ],
)
def test_what_a_condition_hangs_on(text, toggled):
    _, done, _ = dialogue(("[mms_issue]break_app_sms_permission|user_abroad_roaming_enabled_off[",), text)
    assert ("toggle_roaming" in done) == toggled


def test_the_same_act_under_two_conditions_is_two_acts():
    text = "If your SIM card is missing, restart your phone. If the MMSC URL is not set, restart your phone."
    _, done, _ = dialogue(("[mms_issue]break_apn_mms_setting|user_abroad_roaming_disabled_on[",), text)
    assert done.count("reboot_device") == 1


def test_a_test_after_a_change_is_made_again():
    text = "Run a speed test. Turn off Data Saver. Run a speed test."
    said, done, _ = dialogue(("[mobile_data_issue]data_saver_mode_on[",), text)
    assert done.count("run_speed_test") == 2 and said[0].endswith("###STOP###")


def test_each_of_two_conditions_has_its_own_act():
    said, done, _ = dialogue(
        ("[mobile_data_issue]data_saver_mode_on[",),
        "Can you please turn off Data Saver if it is enabled, and disconnect the VPN if it is connected?",
    )
    assert "toggle_data_saver_mode" in done and "disconnect_vpn" not in done and said[0] == "Done, VPN is off."


@pytest.mark.parametrize("shown", ["3G or 2G", "3G or lower", "2G only", "anything other than 4G or 5G"])
def test_every_network_mode_of_a_condition_counts(shown):
    text = f"If your network mode is set to {shown}, please change it to 4G/5G."
    _, done, _ = dialogue(("[mobile_data_issue]bad_network_preference[",), text)
    assert "set_network_mode_preference" in done


def test_reports_do_not_contradict_themselves():
    said, _, _ = dialogue(
        ("[mobile_data_issue]data_mode_off|user_abroad_roaming_enabled_off[",),
        "Please make sure roaming is on. If roaming is off, turn it on. Please turn roaming on.",
    )
    assert "already" not in said[0]
    said, _, _ = dialogue(
        ("[service_issue]airplane_mode_on|unseat_sim_card[",),
        "If you have a signal, run a speed test. Turn airplane mode off and re-seat your SIM card.",
    )
    assert "no signal" not in said[0]


def test_an_offer_is_answered_when_consent_is_asked_a_message_later():
    said, done, _ = dialogue(
        ("[mobile_data_issue]data_usage_exceeded[",),
        "I can refuel 2.0 GB of data for $4.00.",
        "Shall I go ahead?",
        "I'll enable roaming on your line. Is that okay?",
    )
    assert said[:2] == ["Yes, please refuel 2 GB."] * 2 and done == []
    said, _, _ = dialogue(
        ("[mobile_data_issue]data_usage_exceeded[",), "Would you like to change your plan?", "Do you confirm?"
    )
    assert said == ["I don't want to change my plan."] * 2


def test_questions_about_what_was_done_do_nothing():
    said, done, _ = dialogue(
        ("[service_issue]break_apn_settings[",), "Have you restarted your phone?", "Did you turn on airplane mode?"
    )
    assert said == ["I haven't restarted the phone yet.", "Airplane mode is off."] and "reboot_device" not in done


def test_only_a_transfer_that_takes_place_is_one():
    (said,), _, _ = dialogue(("[service_issue]unseat_sim_card[",), "You are not being transferred. Check your SIM.")
    assert said == "SIM is missing."
    (said,), _, _ = dialogue(("[service_issue]unseat_sim_card[",), "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT.")
    assert said == "###TRANSFER###"


def test_off_and_on_again_ends_on():
    said, _, _ = dialogue(
        ("[mms_issue]bad_wifi_calling[",), "Turn mobile data off and then on again. Check your network status."
    )
    assert "mobile data is on" in said[0]


def test_reports_come_from_the_phone():
    said, _, _ = dialogue(
        ("[mms_issue]", "airplane_mode_on|bad_network_preference|bad_wifi_calling|break_apn_mms_setting["),
        "Please check your network status.",
        "Check network mode, Wi-Fi calling, messaging permissions and APN settings.",
        "What is your name? Are you abroad?",
    )
    assert said[0] == "Airplane mode is on, SIM is active, no signal, mobile data is on, roaming is off."
    assert said[1] == (
        "Network mode is 2G only, Wi-Fi calling is on, SMS permission is on, storage permission is on, "
        "APN is internet, MMSC is not set."
    )
    assert said[2] == "I'm John Smith, 555-123-2002, I'm at home in the United States."


def test_offers_are_answered_from_the_scenario():
    said, _, _ = dialogue(
        ("[mobile_data_issue]data_usage_exceeded[",),
        "Would you like to refuel 2 GB for $4.00?",
        "Would you like to change your plan?",
    )
    assert said == ["Yes, please refuel 2 GB.", "I don't want to change my plan."]


def test_payment_needs_a_request():
    said, done, _ = dialogue(("[service_issue]overdue_bill_suspension[",), "Please pay your bill.")
    assert "make_payment" not in done and "no payment request" in said[0]


def test_a_reset_without_a_restart_is_said_to_wait():
    said, _, _ = dialogue(("[service_issue]break_apn_settings[",), "Please reset your APN settings.")
    assert "next restart" in said[0] and "no signal" in said[0]


def test_the_same_request_without_effect_ends_the_call():
    said, _, _ = dialogue(("[mobile_data_issue]data_mode_off[",), *["Please run a speed test."] * 8)
    assert said[1] == "Speed test: still no connection." and "###STOP###" in said[-1] and len(said) < 8


def test_a_working_phone_ends_the_call_only_on_the_customers_own_terms():
    """Data: only an excellent speed test ends the call. MMS: only a message that can be sent."""
    said, _, _ = dialogue(("[mobile_data_issue]bad_vpn[",), "Run a speed test.")
    assert "###" not in said[0]
    said, _, _ = dialogue(("[mms_issue]bad_wifi_calling[",), "Run a speed test.")
    assert said[0] == "Speed test: 220 Mbps, excellent."


HEADED = """1. **Airplane Mode**: Is it on? If yes, please turn it off.
2. **Mobile Data**: Is it on? If not, please turn it on.
3. **Data Saver**: Is it on? If yes, please turn it off."""


def test_a_list_item_with_a_heading_keeps_its_conditions_to_itself():
    task = ("[mobile_data_issue]airplane_mode_on|data_saver_mode_on[",)
    _, done, _ = dialogue(task, HEADED)
    assert {"toggle_airplane_mode", "toggle_data_saver_mode"} <= set(done) and "toggle_data" not in done
    _, done, _ = dialogue(task, HEADED.replace("Is it on? If yes,", "If it's on,"))
    assert {"toggle_airplane_mode", "toggle_data_saver_mode"} <= set(done) and "toggle_data" not in done


@pytest.mark.parametrize(
    "text",
    [
        "OK, please disable it and let me know if you get signal.",
        "Turn it off please.",
        "Great, please turn that off.",
        "Tap the icon to switch it off.",
    ],
)
def test_it_may_be_what_the_customer_spoke_of(text):
    _, done, _ = dialogue(("[service_issue]airplane_mode_on[",), "Is Airplane Mode enabled?", text)
    assert done.count("toggle_airplane_mode") == 1


def test_the_missing_permission_of_an_answer():
    def granted(task, *texts):
        said, _, _ = dialogue((task,), *texts, "Check the messaging permissions.")
        return said[-1]

    task = "[mms_issue]break_app_both_permissions["
    assert "permission is off" in granted(task, "Are the SMS and storage permissions both granted now?")
    both = "SMS permission is on, storage permission is on."
    assert granted(task, "Does the app have both the storage and SMS permissions? If not, grant them.") == both
    task = "[mms_issue]break_app_sms_permission|data_mode_off["
    assert granted(task, "Check the messaging permissions.", "Please grant the missing one.") == both


def test_the_same_answer_after_a_change_is_no_repetition():
    fixes = (
        "turn off airplane mode",
        "reseat your SIM card",
        "change your network mode to 5G",
        "turn off Wi-Fi calling",
    )
    task = ("[mms_issue]airplane_mode_on|bad_network_preference|bad_wifi_calling|break_apn_mms_setting|", "unseat_sim")
    said, _, _ = dialogue(task, *(text for fix in fixes for text in (f"Please {fix}.", "Please try sending an MMS.")))
    assert "###" not in " ".join(said)


def test_a_report_comes_after_what_was_done():
    said, done, _ = dialogue(
        ("[mms_issue]break_apn_mms_setting|user_abroad_roaming_enabled_off[",),
        "The MMSC URL needs to be set. Could you reset the APN settings and reboot?",
    )
    assert said == ["Done, APN is internet, MMSC is set."]
    said, done, _ = dialogue(
        ("[mobile_data_issue]data_saver_mode_on|user_abroad_roaming_enabled_off[",),
        "Roaming needs to be on. Please check whether it is on. If it's off, turn it on and run the speed test again.",
    )
    assert "toggle_roaming" in done and "speed test: 55 Mbps" in said[0]


def test_nothing_is_said_twice_in_one_answer():
    said, _, _ = dialogue(
        ("[service_issue]airplane_mode_on[",), "Please check your network status and your status bar.", "Is it on?"
    )
    assert said[0].lower().count("airplane mode") == 1
    said, _, _ = dialogue(
        ("[service_issue]unseat_sim_card[",), "Make sure airplane mode is off, then check your network status."
    )
    assert said[0].lower().count("airplane mode") == 1


def test_an_offer_ends_when_the_talk_is_about_something_else():
    said, _, _ = dialogue(
        ("[mobile_data_issue]data_usage_exceeded[",),
        "May I refuel 2 GB for $4.00?",
        "Is the VPN on?",
        "I'll also add a note to your account. Is that okay?",
    )
    assert said[2] == "Yes, please go ahead."


def test_command_line(capsys):
    assert main(["--split", "small", "--agent", "teacher"]) == 0
    assert "20/20 solved" in capsys.readouterr().out
    assert main(["--split", "nope"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown split 'nope'")
