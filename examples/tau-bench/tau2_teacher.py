"""Agents without a language model: the scripted teacher, and two floors to compare with.

The teacher follows the telecom policy's workflow from the customer's words and its own tool results, never from a
task's gold actions. Run it over a split with the scripted customer:

    python examples/tau-bench/tau2_teacher.py --split test [--agent teacher|always-transfer|do-nothing] [--redraw-ids]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

from tau2_episode import AgentToolCall, AgentTurn, BadInput, Episode, EpisodeConfig, load_tasks, run_episode

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


class ScriptedTeacher:
    """Follows the workflow: identify, then service, mobile data, MMS. Checks first, fixes only what is wrong.

    style "checks" asks what the phone shows and lists the fixes for what is wrong; "checklist" asks for the fixes of
    the issue's paths "where needed" and leaves the looking to the customer, which a small model learns far sooner.
    With probability `slip` it forgets a fix in its first round of checks and mends that later, for traces that show
    how to recover; `slips` lists those turns (the first is 0), which nobody should learn.
    """

    def __init__(self, style: str = "checks", slip: float = 0.0, seed: int = 0) -> None:
        self.style, self.slip, self.rng = style, slip, random.Random(seed)
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
            said = (yield from _say(f"Please check {_CHECKS[self._issue]}.")).lower()
            if "locked" in said:
                return
            fixes = self._fixes(said)
            if number and not fixes:
                return
            fixes = self._forget(fixes) if number == 0 else fixes
            if fixes or self._issue != "service":
                said = (yield from _say(_please([*fixes, *self._test]))).lower()
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
        request = _please([*fixes, *self._test]).replace("Please", "please")
        said = (yield from _say(f"For your {_ISSUES[self._issue]} problem, where needed, {request}")).lower()
        if "locked" in said:
            return
        if self._issue == "service":
            yield from self._service()
        elif "no connection" in said or "mms fails" in said:
            yield from self._account()

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
        said = yield from _say(_please(["reset your APN settings", "restart your phone", *self._test]))
        if "no signal" not in said.lower():
            return said.lower()
        yield from self._find_line()
        if self.line.get("status") != "Suspended":
            return said.lower()
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
        yield from _say(f"I sent a payment request of ${bill['total_due']}. Please check it and pay it.")
        bill = json.loads((yield from _call("get_details_by_id", id=bill["bill_id"])))
        if bill["status"] != "Paid":
            return ""
        yield from _call("resume_line", **ids, line_id=self.line["line_id"])
        return (yield from _say("Your line is active again. Please restart your phone.")).lower()

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
            said = yield from _say(f"Your data is used up. May I refuel 2 GB for ${price:.2f}?")
            if not said.lower().startswith("yes"):
                return ""
            yield from _call("refuel_data", **ids, gb_amount=REFUEL_GB)
        return (yield from _say(_please(self._test))).lower()

    # -- steps -------------------------------------------------------------------------------------------------------

    def _identify(self) -> Steps:
        said = self.opening
        while not (phone := re.search(r"\d{3}-\d{3}-\d{4}", said)):
            said = yield from _say("What is your phone number?")
        self.phone = phone.group()
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
        if "MMS" in self.opening or "picture" in self.opening:
            return "mms"
        return "data" if re.search(r"data|internet", self.opening) else "service"

    @property
    def _abroad(self) -> bool:
        return bool(re.search(r"abroad|travel", self.opening))

    @property
    def _test(self) -> list[str]:
        return _TESTS[self._issue]


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


async def run_split(agent: type, split: str, config: EpisodeConfig, seed: int = 0) -> list[Episode]:
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", default="test")
    parser.add_argument("--agent", choices=sorted(AGENTS), default="teacher")
    parser.add_argument("--redraw-ids", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", metavar="TASK_ID_PART", help="print the transcripts of matching tasks")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        config = EpisodeConfig(redraw_ids=args.redraw_ids)
        episodes = asyncio.run(run_split(AGENTS[args.agent], args.split, config, args.seed))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for episode in episodes:
        if args.show and args.show in episode.task_id:
            print(
                f"--- {episode.task_id}: {episode.end_reason.value}, reward {episode.reward}\n{transcript(episode)}\n"
            )
    solved = sum(episode.solved for episode in episodes)
    reasons = dict(Counter(episode.end_reason.value for episode in episodes))
    seconds = time.perf_counter() - began
    print(f"{args.agent} with the scripted customer: {solved}/{len(episodes)} solved, {reasons}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
