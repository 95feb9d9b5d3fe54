"""Agents without a language model: the scripted teacher, and two floors to compare with.

The teacher follows the telecom policy's workflow from the customer's words and its own tool results, never from a
task's gold actions. Run it over a split with the scripted customer:

    python examples/tau-bench/tau2_teacher.py --split test [--agent teacher|always-transfer|do-nothing] [--redraw-ids]
    python examples/tau-bench/tau2_teacher.py --split train --mood all --style checklist
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

from tau2_domains import load_tasks
from tau2_episode import AgentToolCall, AgentTurn, Episode, EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_moods import CHOICES
from tau2_parser import ArgumentParser

TODAY = "2025-02-25"  # the policy's current date
HANDOVER = "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."
ROUNDS = 3  # of checks and fixes before a human takes over
STYLES = ("checks", "checklist")
REFUEL_GB = 2.0  # the most that the policy allows
Steps = Generator[AgentTurn, str, Any]
_CHECKS = {
    "service": "your network status",
    "data": "your network status, Data Saver, network mode and VPN",
    "mms": "your network status, network mode, Wi-Fi calling, messaging permissions and APN settings",
}
# The same paths for a customer who looks and mends in one go: nothing in these messages depends on a report.
_CHECKLISTS = {
    "service": ["turn airplane mode off", "re-seat your SIM card"],
    "data": ["turn Data Saver off", "set network mode to 5G", "disconnect the VPN"],
    "mms": [
        "set network mode to 5G",
        "turn Wi-Fi calling off",
        "grant the SMS permission",
        "grant the storage permission",
        "reset your APN settings",
        "restart your phone",
    ],
}
_ISSUES = {"service": "network service", "data": "internet", "mms": "MMS"}
_TESTS = {"service": [], "data": ["run a speed test"], "mms": ["try an MMS"]}
CLARIFICATIONS = 3  # in a row, of one request

# What customers say, brought to the words that the teacher looks for.
_HEARD = [
    (r"\b(flight|aeroplane) mode\b|\bairplane\b(?! mode)", "airplane mode"),
    (r"\bcellular data\b", "mobile data"),
    (r"\bdata saving mode\b|(?<!data )\bsaver\b", "data saver"),
    (r"\bthe preferred network(?= is\b)", "network mode"),
    (r"\bmode (?=[2-5]g\b)", "network mode is "),
    (r"\bcalling over wi-fi\b", "wi-fi calling"),
    (r"\bpermission for (sms|storage)\b", r"\1 permission"),
    (r"\b(sms|storage) (on|off)\b", r"\1 permission is \2"),
    (r"\bno mmsc\b|\bthe mmsc field is empty\b", "mmsc is not set"),
    (r"\bno bars\b", "no signal"),
    (r"\bsim missing\b|\bthere is no sim card\b", "sim is missing"),
    (r"\bpicture message failed\b|\bmms failed\b", "mms fails"),
    (r"(?<!mobile )\bdata (on|off)\b", r"mobile data is \1"),
    (r"\b(airplane mode|roaming|data saver|vpn|wi-fi calling) (on|off)\b", r"\1 is \2"),
]
_ASKED_BACK = re.compile(r"(where do i find|what do you mean by|which one is) (.+?)(, and where is it)?\?")
_MIXED_UP = re.compile(r"instead of (?:the )?(.+?) and put it back")
_TURNED_ON = re.compile(r"\bi also turned (?:the )?(.+?)(?: is)? on\b")
_AGAIN = {
    "airplane mode": "turn airplane mode off",
    "mobile data": "turn mobile data on",
    "roaming": "turn roaming on",
    "data saver": "turn Data Saver off",
    "vpn": "disconnect the VPN",
    "wi-fi calling": "turn Wi-Fi calling off",
    "network mode": "set network mode to 5G",
}

# Equivalent wordings: (pattern, words) over the sentences of this file, which are the first wording.
_PLEASE = r"^Please (.+)\.$"
WORDINGS: list[list[tuple[str, str]]] = [
    [],
    [
        (_PLEASE, r"Could you please \1?"),
        (r"where needed, please (.+)\.$", r"I ask you to do this where needed: \1."),
        (r"turn airplane mode off", "switch airplane mode off"),
        (r"re-seat your SIM card", "take your SIM card out and put it back in"),
        (r"turn (mobile data|roaming) on", r"switch \1 on"),
        (r"turn Data Saver off", "disable Data Saver"),
        (r"turn Wi-Fi calling off", "disable Wi-Fi calling"),
        (r"restart your phone", "reboot your phone"),
        (r"try an MMS", "send a test MMS"),
        (r"^What is your", "May I have your"),
        (r"May I refuel 2 GB for (\S+)\?", r"Shall I refuel 2 GB? That is \1."),
        (r"I sent a payment request of (\S+)\.", r"You have a new payment request of \1."),
    ],
    [
        (_PLEASE, r"Now please \1."),
        (r"^For your (.+) problem, where needed, please", r"To mend your \1, please do this where needed:"),
        (r"turn airplane mode off", "disable airplane mode"),
        (r"re-seat your SIM card", "remove and re-insert your SIM card"),
        (r"turn (mobile data|roaming) on", r"enable \1"),
        (r"set network mode to 5G", "change the network mode to 5G"),
        (r"disconnect the VPN", "turn the VPN off"),
        (r"grant the (SMS|storage) permission", r"allow the \1 permission"),
        (r"reset your APN settings", "reset the APN settings to default"),
        (r"run a speed test", "test your speed"),
        (r"^Your data is used up\.", "You have used all of your data."),
        (r"^Your line is active again\.", "I have resumed your line."),
    ],
    [
        (_PLEASE, r"I need you to \1, please."),
        (r"^For your (.+) problem, where needed, please (.+)\.$", r"Let's mend your \1. Please \2, where needed."),
        (r"turn (airplane mode|Data Saver|Wi-Fi calling) off", r"turn off \1"),
        (r"turn (mobile data|roaming) on", r"turn on \1"),
        (r"set network mode to 5G", "switch the network mode to 5G"),
        (r"grant the (SMS|storage) permission", r"give the messaging app the \1 permission"),
        (r"try an MMS", "try to send an MMS"),
        (r"restart your phone", "restart the phone"),
        (r"Please check it and pay it\.", "Please look at it, then pay it."),
    ],
]


class ScriptedTeacher:
    """Follows the workflow: identify, then service, mobile data, MMS. Checks first, fixes only what is wrong.

    style "checks" asks what the phone shows and lists the fixes for what is wrong; "checklist" asks for the fixes of
    the issue's paths "where needed" and leaves the looking to the customer, which a small model learns far sooner.
    With probability `slip` it forgets a fix in its first list and mends that, if the customer is still there, for
    traces that show how to recover; `slips` lists those turns (the first is 0), which nobody should learn. It answers
    what is asked back, asks again for what the customer got wrong, and undoes what the customer did unasked.
    `wording`: one of WORDINGS.
    """

    def __init__(self, style: str = "checks", slip: float = 0.0, seed: int = 0, wording: int = 0) -> None:
        self.style, self.slip, self.rng, self.wording = style, slip, random.Random(seed), WORDINGS[wording]
        self.slips: list[int] = []
        self.turn = -1
        self.plan: Steps | None = None
        self.customer: dict[str, Any] = {}
        self.line: dict[str, Any] = {}
        self.account_seen = False
        self.opening = ""

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        self.plan = None

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        text = new_messages[-1]["content"]
        self.turn += 1
        if self.plan is None:
            self.plan = self._support(text)
            return next(self.plan)
        return self.plan.send(text)

    # -- the workflow ------------------------------------------------------------------------------------------------

    def _support(self, opening: str) -> Steps:
        self.opening = opening
        yield from self._identify()
        yield from (self._solve_by_checklist() if self.style == "checklist" else self._solve())
        while True:
            yield from self._transfer()

    def _solve(self) -> Steps:
        """Rounds of one message with the checks of every path that the issue needs and one with the fixes; our own
        side once. Returns when nothing is left to try: a customer whose problem is solved ends the call by itself."""
        for number in range(ROUNDS):
            said = yield from self._look()
            if "locked" in said:
                return
            fixes = self._fixes(said)
            if number and not fixes:
                return
            fixes = self._forget(fixes) if number == 0 else fixes
            if fixes or self._issue != "service":
                said = yield from self._ask(_please([*fixes, *self._test]))
            if "locked" in said:
                return
            if number == 0 and ("no signal" in said or self._issue == "service"):
                said = yield from self._service()
            if ("no connection" in said or "mms fails" in said) and not self.account_seen:
                said = yield from self._account()
            if said == "":
                return

    def _solve_by_checklist(self) -> Steps:
        """As `_solve`, in one message for all paths of the issue. It begins with the issue: a small model that has to
        remember it in the middle of the list takes one list for the other."""
        fixes = list(_CHECKLISTS["service"])
        if self._issue != "service":
            fixes += ["turn mobile data on", *(["turn roaming on"] if self._abroad else [])]
            fixes += _CHECKLISTS[self._issue]
        asked = self._forget(fixes)
        said = yield from self._ask(self._checklist(asked))
        if len(asked) < len(fixes) and "locked" not in said:
            said = yield from self._ask(self._checklist(fixes))
        if "locked" in said:
            return
        if self._issue == "service":
            yield from self._service()
        elif "no connection" in said or "mms fails" in said:
            yield from self._account()

    def _checklist(self, fixes: list[str]) -> str:
        request = _please([*fixes, *self._test]).replace("Please", "please")
        return f"For your {_ISSUES[self._issue]} problem, where needed, {request}"

    def _forget(self, fixes: list[str]) -> list[str]:
        """The list without one of its fixes, now and then."""
        if not fixes or self.rng.random() >= self.slip:
            return fixes
        self.slips.append(self.turn)
        forgotten = self.rng.randrange(len(fixes))
        return fixes[:forgotten] + fixes[forgotten + 1 :]

    def _fixes(self, report: str) -> list[str]:
        """What the report shows to be wrong, in the workflow's order."""
        wrong = [
            ("airplane mode is on" in report, "turn airplane mode off"),
            ("sim is missing" in report, "re-seat your SIM card"),
            ("mobile data is off" in report and self._issue != "service", "turn mobile data on"),
            ("roaming is off" in report and self._abroad, "turn roaming on"),
            ("data saver is on" in report, "turn Data Saver off"),
            (re.search(r"network mode is [23]g", report), "set network mode to 5G"),
            ("vpn is on" in report, "disconnect the VPN"),
            ("wi-fi calling is on" in report, "turn Wi-Fi calling off"),
            ("sms permission is off" in report, "grant the SMS permission"),
            ("storage permission is off" in report, "grant the storage permission"),
            ("mmsc is not set" in report, "reset your APN settings"),
            ("mmsc is not set" in report, "restart your phone"),
        ]
        return [fix for is_wrong, fix in wrong if is_wrong]

    def _service(self) -> Steps:
        """Path 1 beyond airplane mode and SIM: APN settings, then the line. Returns the last answer; "" at the end."""
        said = yield from self._ask(_please(["reset your APN settings", "restart your phone", *self._test]))
        if self._issue == "service" and "signal" not in said:
            said = yield from self._ask("Please check your status bar.")
        if "no signal" not in said:
            return said
        yield from self._find_line()
        if self.line.get("status") != "Suspended":
            return said
        if self.line["contract_end_date"] < TODAY:
            return ""
        return (yield from self._lift_suspension())

    def _lift_suspension(self) -> Steps:
        """Overdue bill: payment request, payment, check that it is paid, resume the line, restart."""
        bill = yield from self._overdue_bill()
        if bill is None:
            return ""
        ids = {"customer_id": self.customer["customer_id"]}
        yield from _call("send_payment_request", **ids, bill_id=bill["bill_id"])
        yield from self._ask(f"I sent a payment request of ${bill['total_due']}. Please check it and pay it.")
        bill = json.loads((yield from _call("get_details_by_id", id=bill["bill_id"])))
        if bill["status"] != "Paid":
            return ""
        yield from _call("resume_line", **ids, line_id=self.line["line_id"])
        return (yield from self._ask("Your line is active again. Please restart your phone."))

    def _overdue_bill(self) -> Steps:
        for bill_id in reversed(self.customer["bill_ids"]):
            bill = json.loads((yield from _call("get_details_by_id", id=bill_id)))
            if bill["status"] == "Overdue":
                return bill
        return None

    def _account(self) -> Steps:
        """Path 2.1 on our side: roaming on the line, then data usage. Returns what a new test says; "" at the end."""
        self.account_seen = True
        if not self.line:
            yield from self._find_line()
        ids = {"customer_id": self.customer["customer_id"], "line_id": self.line["line_id"]}
        if self._abroad and not self.line["roaming_enabled"]:
            yield from _call("enable_roaming", **ids)
        plan = json.loads((yield from _call("get_details_by_id", id=self.line["plan_id"])))
        if self.line["data_used_gb"] >= plan["data_limit_gb"] + self.line["data_refueling_gb"]:
            price = REFUEL_GB * plan["data_refueling_price_per_gb"]
            said = yield from self._ask(f"Your data is used up. May I refuel 2 GB for ${price:.2f}?")
            if not re.search(r"\byes\b", said):
                return ""
            yield from _call("refuel_data", **ids, gb_amount=REFUEL_GB)
        return (yield from self._ask(_please(self._test)))

    # -- listening ---------------------------------------------------------------------------------------------------

    def _ask(self, request: str) -> Steps:
        """Says the request, and then what it takes until the customer has carried it out. Returns the last answer, as
        `hear` gives it."""
        text, slipped = self._worded(request), self.turn in self.slips
        said = hear((yield from _say(text)))
        for _ in range(CLARIFICATIONS):
            more = self._more(said, text)
            if not more or "locked" in said:
                break
            if more == text and slipped:
                self.slips.append(self.turn)
            said = hear((yield from _say(more)))
        return said

    def _more(self, said: str, text: str) -> str:
        """What the answer calls for before anything else; "" when nothing."""
        if asked := _ASKED_BACK.search(said):
            explained = f"You find {asked[2]} in the settings. Please do all of that."
            return explained if self.wording in WORDINGS[::2] else text
        for pattern in (_MIXED_UP, _TURNED_ON):
            if (found := pattern.search(said)) and (fix := _AGAIN.get(found[1])):
                return self._worded(_please([fix, *self._test]))
        return ""

    def _look(self) -> Steps:
        """What the phone shows of all that the issue needs: a customer who says little is asked for the rest."""
        said = yield from self._ask(f"Please check {_CHECKS[self._issue]}.")
        if self._issue != "service" and "mobile data is" not in said and "locked" not in said:
            said += " " + (yield from self._ask("Please check mobile data and roaming."))
        return said

    def _worded(self, text: str) -> str:
        for pattern, words in self.wording:
            text = re.sub(pattern, words, text)
        return text

    # -- steps -------------------------------------------------------------------------------------------------------

    def _identify(self) -> Steps:
        while not (phone := _phone_number(self.opening)):
            self.opening += " " + (yield from _say(self._worded("What is your phone number, and are you abroad?")))
        self.phone = phone
        self.customer = _object((yield from _call("get_customer_by_phone", phone_number=self.phone)))

    def _find_line(self) -> Steps:
        """The line whose number the customer gave."""
        for line_id in self.customer.get("line_ids", []):
            self.line = _object((yield from _call("get_details_by_id", id=line_id)))
            if self.line.get("phone_number") == self.phone:
                return

    def _transfer(self) -> Steps:
        yield from _call("transfer_to_human_agents", summary=f"{self._issue} issue not solved")
        yield from _say(HANDOVER)

    @property
    def _issue(self) -> str:
        if re.search(r"MMS|[Pp]icture", self.opening):
            return "mms"
        return "data" if re.search(r"data|[Ii]nternet", self.opening) else "service"

    @property
    def _abroad(self) -> bool:
        return bool(re.search(r"(?<!not )abroad|travel", self.opening))

    @property
    def _test(self) -> list[str]:
        return _TESTS[self._issue]


def hear(text: str) -> str:
    """The customer's text in lower case and in the words that the teacher looks for."""
    text = text.lower()
    for pattern, words in _HEARD:
        text = re.sub(pattern, words, text)
    return text


def _phone_number(text: str) -> str:
    """The number that the text calls the customer's own, else its first; "" for none."""
    number = r"\d{3}-\d{3}-\d{4}"
    found = re.search(rf"(?:my|phone) number is ({number})", text) or re.search(f"({number})", text)
    return found[1] if found else ""


def _please(actions: list[str]) -> str:
    """["a", "b", "c"] -> "Please a, b, then c." """
    return f"Please {', '.join(actions[:-1])}, then {actions[-1]}." if actions[1:] else f"Please {actions[0]}."


def _object(text: str) -> dict[str, Any]:
    """A tool result as an object; an error text as an empty one."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}


def _say(text: str) -> Steps:
    return (yield AgentTurn(content=text))


def _call(name: str, **arguments: Any) -> Steps:
    return (yield AgentTurn(tool_calls=[AgentToolCall(name, arguments)]))


class AlwaysTransfer:
    """The floor: hands every customer over at once. Some tasks have no other solution."""

    def __init__(self) -> None:
        self.called = False

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        self.called = False

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        if self.called:
            return AgentTurn(content=HANDOVER)
        self.called = True
        return AgentTurn(tool_calls=[AgentToolCall("transfer_to_human_agents", {"summary": "unsolved"})])


class DoNothing:
    """Never helps; the customer hangs up by itself."""

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        return None

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        return AgentTurn(content="Okay.")


AGENTS = {"teacher": ScriptedTeacher, "always-transfer": AlwaysTransfer, "do-nothing": DoNothing}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


async def run_split(agent: Callable[[], Any], split: str, config: EpisodeConfig, seed: int = 0) -> list[Episode]:
    """One episode per task of the split."""
    return [await run_episode(task, agent(), config, seed) for task in load_tasks(config.domain, split)]


def transcript(episode: Episode) -> str:
    """The dialogue as both sides saw it, the customer's phone actions indented."""
    lines = []
    for message in episode.simulation.messages:
        for call in getattr(message, "tool_calls", None) or []:
            indent = "    " if message.role == "user" else ""
            lines.append(f"{indent}{message.role}> {call.name}({json.dumps(call.arguments)})")
        if message.role == "tool":
            lines.append(f"{'    ' if message.requestor == 'user' else ''}tool< {message.content}")
        elif not message.is_tool_call():
            lines.append(f"{message.role}: {message.content}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--agent", choices=sorted(AGENTS), default="teacher")
    parser.add_argument("--style", choices=STYLES, default="checks", help="how the teacher asks")
    parser.add_argument("--wording", type=int, choices=range(len(WORDINGS)), default=0, help="the teacher's")
    parser.add_argument("--mood", choices=[*CHOICES, "all"], default="plain", help="the customer's (tau2_moods.py)")
    parser.add_argument("--redraw-ids", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", metavar="TASK_ID_PART", help="print the transcripts of matching tasks")
    args = parser.parse_args(argv)
    try:
        for mood in CHOICES if args.mood == "all" else [args.mood]:
            run_mood(args, mood)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_mood(args: argparse.Namespace, mood: str) -> None:
    """One episode per task with a customer of this mood; prints how they ended."""
    began = time.perf_counter()
    agent = AGENTS[args.agent]
    if agent is ScriptedTeacher:
        agent = functools.partial(ScriptedTeacher, args.style, wording=args.wording)
    user_args = {} if mood == "plain" else {"mood": mood}
    config = EpisodeConfig(user_args=user_args, redraw_ids=args.redraw_ids)
    episodes = asyncio.run(run_split(agent, args.split, config, args.seed))
    for episode in episodes:
        if args.show and args.show in episode.task_id:
            print(
                f"--- {episode.task_id}: {episode.end_reason.value}, reward {episode.reward}\n{transcript(episode)}\n"
            )
    solved = sum(episode.solved for episode in episodes)
    reasons = dict(Counter(episode.end_reason.value for episode in episodes))
    turns = sum(episode.agent_turns for episode in episodes) / len(episodes)
    seconds = time.perf_counter() - began
    customer = "the scripted customer" if mood == "plain" else f"the scripted customer, mood {mood}"
    told = f"{solved}/{len(episodes)} solved, {reasons}, {turns:.1f} turns an episode, {seconds:.1f} s"
    print(f"{args.agent} with {customer}: {told}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
