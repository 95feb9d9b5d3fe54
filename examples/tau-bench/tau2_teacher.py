"""Agents without a language model: the scripted teacher, and two floors to compare with.

The teacher follows the telecom policy's workflow from the customer's words and its own tool results, never from a
task's gold actions. Run it over a split with the scripted customer:

    python examples/tau-bench/tau2_teacher.py --split test [--agent teacher|always-transfer|do-nothing] [--redraw-ids]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

from tau2_episode import AgentToolCall, AgentTurn, BadInput, Episode, EpisodeConfig, load_tasks, run_episode

TODAY = "2025-02-25"  # the policy's current date
HANDOVER = "YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON."
REFUEL_GB = 2.0  # the most that the policy allows
Steps = Generator[AgentTurn, str, Any]
_CHECKS = {
    "service": "your network status",
    "data": "your network status, Data Saver, network mode and VPN",
    "mms": "your network status, network mode, Wi-Fi calling, messaging permissions and APN settings",
}
_TESTS = {"service": [], "data": ["run a speed test"], "mms": ["try an MMS"]}


class ScriptedTeacher:
    """Follows the workflow: identify, then service, mobile data, MMS. Checks first, fixes only what is wrong."""

    def __init__(self) -> None:
        self.plan: Steps | None = None
        self.customer: dict[str, Any] = {}
        self.line: dict[str, Any] = {}
        self.opening = ""

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        self.plan = None

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        text = new_messages[-1]["content"]
        if self.plan is None:
            self.plan = self._support(text)
            return next(self.plan)
        return self.plan.send(text)

    # -- the workflow ------------------------------------------------------------------------------------------------

    def _support(self, opening: str) -> Steps:
        self.opening = opening
        yield from self._identify()
        yield from self._solve()
        while True:
            yield from self._transfer()

    def _solve(self) -> Steps:
        """One message with the checks of every path that the issue needs, one with the fixes, then our own side.

        Returns when nothing is left to try: a customer whose problem is solved ends the call by itself."""
        said = (yield from _say(f"Please check {_CHECKS[self._issue]}.")).lower()
        if "locked" in said:
            return
        fixes = self._fixes(said)
        if fixes or self._issue != "service":
            said = (yield from _say(_please([*fixes, *self._test]))).lower()
        if "locked" in said:
            return
        if "no signal" in said or self._issue == "service":
            said = yield from self._service()
        if "no connection" in said or "mms fails" in said:
            yield from self._account()

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
        """Path 1 beyond airplane mode and SIM: APN settings, then line suspension. Returns the last answer."""
        said = yield from _say(_please(["reset your APN settings", "restart your phone", *self._test]))
        if "no signal" not in said.lower():
            return said.lower()
        yield from self._find_line()
        if self.line.get("status") == "Suspended" and self.line["contract_end_date"] >= TODAY:
            yield from self._lift_suspension()
        return ""

    def _lift_suspension(self) -> Steps:
        """Overdue bill: payment request, payment, check that it is paid, resume the line, restart."""
        bill = yield from self._overdue_bill()
        if bill is None:
            return
        ids = {"customer_id": self.customer["customer_id"]}
        yield from _call("send_payment_request", **ids, bill_id=bill["bill_id"])
        yield from _say(f"I sent a payment request of ${bill['total_due']}. Please check it and pay it.")
        bill = json.loads((yield from _call("get_details_by_id", id=bill["bill_id"])))
        if bill["status"] == "Paid":
            yield from _call("resume_line", **ids, line_id=self.line["line_id"])
            yield from _say("Your line is active again. Please restart your phone.")

    def _overdue_bill(self) -> Steps:
        for bill_id in reversed(self.customer["bill_ids"]):
            bill = json.loads((yield from _call("get_details_by_id", id=bill_id)))
            if bill["status"] == "Overdue":
                return bill
        return None

    def _account(self) -> Steps:
        """Path 2.1 on our side: roaming on the line, then data usage."""
        yield from self._find_line()
        ids = {"customer_id": self.customer["customer_id"], "line_id": self.line["line_id"]}
        if self._abroad and not self.line["roaming_enabled"]:
            yield from _call("enable_roaming", **ids)
        plan = json.loads((yield from _call("get_details_by_id", id=self.line["plan_id"])))
        if self.line["data_used_gb"] >= plan["data_limit_gb"] + self.line["data_refueling_gb"]:
            price = REFUEL_GB * plan["data_refueling_price_per_gb"]
            said = yield from _say(f"Your data is used up. May I refuel 2 GB for ${price:.2f}?")
            if not said.lower().startswith("yes"):
                return
            yield from _call("refuel_data", **ids, gb_amount=REFUEL_GB)
        yield from _say(_please(self._test))

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
