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


class ScriptedTeacher:
    """Follows the workflow: identify, then service, mobile data, MMS. Checks before fixing, fixes only what is wrong."""

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
        solved = yield from self._solve()
        while not solved:
            yield from self._transfer()

    def _solve(self) -> Steps:
        """Path 1, then 2, then 3; True never comes back, because a customer whose problem is solved ends the call."""
        said = yield from _say("Please check your network status.")
        if "locked" in said.lower():
            return False
        fixes = self._basic_fixes(said.lower())
        if self._issue == "service":
            return (yield from self._service(fixes))
        said = yield from _say(_please([*fixes, self._test]))
        if "no signal" in said.lower():
            yield from self._service([])
        if "no connection" in said.lower():
            said = yield from self._account()
        if "no connection" in said.lower():
            return False
        return (yield from (self._mms() if self._issue == "mms" else self._slow_data()))

    def _basic_fixes(self, status: str) -> list[str]:
        fixes = []
        if "airplane mode is on" in status:
            fixes.append("turn airplane mode off")
        if "sim is missing" in status:
            fixes.append("re-seat your SIM card")
        if self._issue == "service":
            return fixes
        if "mobile data is off" in status:
            fixes.append("turn mobile data on")
        if "roaming is off" in status and self._abroad:
            fixes.append("turn roaming on")
        return fixes

    def _service(self, fixes: list[str]) -> Steps:
        """Path 1: airplane mode and SIM, APN settings, line suspension."""
        if fixes:
            said = yield from _say(_please(fixes))
            if "locked" in said.lower():
                return False
        yield from _say("Please reset your APN settings and restart your phone.")
        yield from self._find_line()
        if self.line["status"] != "Suspended" or self.line["contract_end_date"] < TODAY:
            return False
        return (yield from self._lift_suspension())

    def _lift_suspension(self) -> Steps:
        """Overdue bill: payment request, payment, check that it is paid, resume the line, restart."""
        bill = yield from self._overdue_bill()
        if bill is None:
            return False
        ids = {"customer_id": self.customer["customer_id"]}
        yield from _call("send_payment_request", **ids, bill_id=bill["bill_id"])
        yield from _say(f"I sent a payment request of ${bill['total_due']}. Please check it and pay it.")
        bill = json.loads((yield from _call("get_details_by_id", id=bill["bill_id"])))
        if bill["status"] != "Paid":
            return False
        yield from _call("resume_line", **ids, line_id=self.line["line_id"])
        yield from _say("Your line is active again. Please restart your phone.")
        return False

    def _overdue_bill(self) -> Steps:
        for bill_id in reversed(self.customer["bill_ids"]):
            bill = json.loads((yield from _call("get_details_by_id", id=bill_id)))
            if bill["status"] == "Overdue":
                return bill
        return None

    def _account(self) -> Steps:
        """Path 2.1 on our side: roaming on the line, data usage. Returns what the customer says after a new test."""
        yield from self._find_line()
        ids = {"customer_id": self.customer["customer_id"], "line_id": self.line["line_id"]}
        if self._abroad and not self.line["roaming_enabled"]:
            yield from _call("enable_roaming", **ids)
        plan = json.loads((yield from _call("get_details_by_id", id=self.line["plan_id"])))
        if self.line["data_used_gb"] >= plan["data_limit_gb"] + self.line["data_refueling_gb"]:
            price = REFUEL_GB * plan["data_refueling_price_per_gb"]
            said = yield from _say(f"Your data is used up. May I refuel 2 GB for ${price:.2f}?")
            if not said.lower().startswith("yes"):
                return "no connection"
            yield from _call("refuel_data", **ids, gb_amount=REFUEL_GB)
        return (yield from _say(_please([self._test])))

    def _slow_data(self) -> Steps:
        """Path 2.2: Data Saver, network mode, VPN."""
        said = (yield from _say("Please check Data Saver, network mode and VPN.")).lower()
        fixes = ["turn Data Saver off"] if "data saver is on" in said else []
        fixes += _network_mode_fix(said)
        fixes += ["disconnect the VPN"] if "vpn is on" in said else []
        if fixes:
            yield from _say(_please([*fixes, self._test]))
        return False

    def _mms(self) -> Steps:
        """Path 3: network mode, Wi-Fi calling, permissions, APN."""
        said = yield from _say("Please check network mode, Wi-Fi calling, messaging permissions and APN settings.")
        said = said.lower()
        fixes = _network_mode_fix(said)
        fixes += ["turn Wi-Fi calling off"] if "wi-fi calling is on" in said else []
        fixes += [f"grant the {p} permission" for p in ("SMS", "storage") if f"{p.lower()} permission is off" in said]
        fixes += ["reset your APN settings", "restart your phone"] if "mmsc is not set" in said else []
        if fixes:
            yield from _say(_please([*fixes, "try an MMS"]))
        return False

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
    def _test(self) -> str:
        return "run a speed test and try an MMS" if self._issue == "mms" else "run a speed test"


def _network_mode_fix(said: str) -> list[str]:
    return ["set network mode to 5G"] if re.search(r"network mode is [23]g", said) else []


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
            print(f"--- {episode.task_id}: {episode.end_reason.value}, reward {episode.reward}\n{transcript(episode)}\n")
    solved = sum(episode.solved for episode in episodes)
    reasons = dict(Counter(episode.end_reason.value for episode in episodes))
    seconds = time.perf_counter() - began
    print(f"{args.agent} with the scripted customer: {solved}/{len(episodes)} solved, {reasons}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
