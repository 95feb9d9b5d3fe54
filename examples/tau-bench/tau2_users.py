"""The customer of an episode: scripted (telecom) or recited (retail, airline; tau2_recited.py), both without a model
and a key, or any LLM through tau2's own user simulator.

The scripted customer sees its task's scenario and its own phone, nothing else. It maps ordinary wordings of an
instruction (tau2_understanding.py) to the phone's tools (tau2_phone.py), reports tersely what the tools say, and ends
the call when its own problem is solved or when the agent keeps getting nowhere. It is cooperative and literal: every
number made with it names it. Harder moods of it are in tau2_moods.py.

A library: `make_customer`, used by tau2_episode.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import tau2_llm_customer
import tau2_moods
from tau2_conditions import NOT, is_failure, is_outcome, opposite, parts
from tau2_llm_customer import CONCURRENCY, DEFAULT_MODEL, LLMCustomer, UnusableCustomer
from tau2_moods import Mood, make_mood, problem_with
from tau2_phone import CHECK_TOOLS, Call, action_calls, check_call, read_phone, switch_call
from tau2_topics import OFFERS, SWITCHES, TOGGLES, find_topics, state
from tau2_understanding import LONGEST_HEARD, TRANSFERRED, Request, parse

STOP, TRANSFER, OUT_OF_SCOPE = "###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###"
SCRIPTED_VERSION = "3"
PATIENCE = 3  # messages without anything to do, or repeats of one request with one answer, before hanging up

# What shows whether the customer's problem is solved.
_ISSUE_TESTS = {"service": "status_bar", "data": "speed", "mms": "mms"}


def has_model(user: str) -> bool:
    """Whether a language model plays this customer."""
    return user not in ("scripted", "recited")


def customer_name(user: str) -> str:
    """The customer that `user` stands for: "llm" is the default model."""
    return DEFAULT_MODEL if user == "llm" else user


def check_settings(user: str, user_args: dict[str, Any]) -> None:
    """Raises UnusableCustomer for settings that a customer without a model does not have."""
    if user == "recited" and user_args:
        raise UnusableCustomer(f"the recited customer has no settings: {', '.join(user_args)} cannot be set")
    if problem := problem_with(user_args):
        raise UnusableCustomer(problem)


def repeats_itself(user: str, user_args: dict[str, Any]) -> bool:
    """Whether the customer is the same with every seed."""
    return not has_model(user) and user_args.get("mood", "plain") == "plain"


def describe_customer(user: str, user_args: dict[str, Any], has_phone: bool) -> dict[str, Any]:
    """The record of this customer in all its episodes, without `drawn`, which is of one. has_phone: whether it has
    tools, which decides what a model is told. Raises UnusableCustomer."""
    if user == "scripted":
        mood = tau2_moods.describe(user_args.get("mood", "plain"))
        return {"kind": "scripted", "version": SCRIPTED_VERSION, **mood}
    if user == "recited":
        from tau2_recited import RECITED_VERSION  # which knows this module

        return {"kind": "recited", "version": RECITED_VERSION}
    return tau2_llm_customer.describe(customer_name(user), user_args, has_phone)


def make_customer(
    user: str,
    user_args: dict[str, Any],
    task: Any,
    tools: Callable[[], list | None],
    seed: int,
    concurrency: int = CONCURRENCY,
) -> Any:
    """The customer named by `user`: "scripted", "recited", "llm" or a litellm model; `tools()` gives its phone's."""
    if user == "scripted":
        return ScriptedCustomer(task.user_scenario, make_mood(user_args.get("mood", "plain"), task.id, seed))
    if user == "recited":
        from tau2_recited import RecitedCustomer  # which knows this module

        return RecitedCustomer(task.user_scenario)
    return LLMCustomer(customer_name(user), user_args, str(task.user_scenario), tools(), seed, concurrency)


# ---------------------------------------------------------------------------------------------------------------------
# The scripted customer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """What the customer knows, read from its scenario's text."""

    issue: str  # "service", "data", "mms"
    complaint: str
    name: str
    phone: str
    location: str
    refuels: bool
    pays: bool

    @classmethod
    def read(cls, user_scenario: Any) -> Scenario:
        told = user_scenario.instructions
        reason, known, wishes = told.reason_for_call, told.known_info or "", told.task_instructions
        issue, complaint = _complaint(reason)
        who = re.search(r"You are (.+?) with phone number ([\d-]+)", known)
        where = re.search(r"currently (.+?)\.", known)
        return cls(
            issue=issue,
            complaint=complaint,
            name=who[1] if who else "",
            phone=who[2] if who else "",
            location=where[1] if where else "",
            refuels="willing to refuel 2.0 GB" in wishes,
            pays="pay a bill, you accept" in wishes,
        )

    @property
    def abroad(self) -> bool:
        return "abroad" in self.location

    @property
    def opening(self) -> str:
        place = f", {self.location}" if self.abroad else ""
        return f"{self.complaint} I'm {self.name}, {self.phone}{place}."


def _complaint(reason: str) -> tuple[str, str]:
    if "MMS" in reason:
        return "mms", "I can't send MMS messages."
    if "mobile data" in reason:
        return "data", "My mobile data is slow or not working, I want excellent speed."
    return "service", "My phone shows No Service."


@dataclass
class _Answer:
    """What the customer will say about one message of the agent."""

    parts: list[str] = field(default_factory=list)
    done: bool = False  # something was changed on the phone
    tested: bool = False  # a speed test or an MMS test is among the parts
    switched: set[str] = field(default_factory=set)  # topics, which were in no such state "already"
    unmet: list[str] = field(default_factory=list)  # conditions that did not hold

    def say(self, part: str) -> None:
        if part and part not in self.parts and part.replace(" is ", " is already ") not in self.parts:
            self.parts.append(part)

    def unsay(self, part: str) -> None:
        """Takes back what is no longer so."""
        self.parts = [said for said in self.parts if said != part]


class ScriptedCustomer:
    """A cooperative customer without a language model. Deterministic, given its mood."""

    def __init__(self, user_scenario: Any, mood: Mood | None = None) -> None:
        self.scenario, self.mood = Scenario.read(user_scenario), mood or Mood()
        self.facts: dict[str, str] = {}
        self.reported: Counter[tuple] = Counter()
        self.fruitless = 0
        self.failed_before: set[str] = set()
        self.opened = False
        self.said: list[str] = []  # what was answered last, which "it" may stand for
        self.changed: dict[str, str] = {}  # what was done to the phone, which makes the same answer a new one
        self.offered: list[Request] = []  # what the agent last offered to do for money, and may ask consent to later
        self.calls_made = 0
        self.pending: list[Call] = []
        self.turn: Generator[list[Call], list[str], str] | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "scripted", "version": SCRIPTED_VERSION, **self.mood.describe()}

    def reply(self, message: Any) -> Any:
        """The next tau2 UserMessage, after an agent's text or after the results of the customer's own tool calls."""
        if message.role == "tool":
            results = getattr(message, "tool_messages", None) or [message]
            return self._advance([result.content for result in results])
        if not self.opened:
            self.opened = True
            return self._text(self.mood.opening(self.scenario))
        self.turn = self._serve(message.content or "")
        return self._advance(None)

    def _advance(self, results: list[str] | None) -> Any:
        if results is not None:
            for (tool, _), output in zip(self.pending, results, strict=True):
                self.facts |= read_phone(tool, output)
        try:
            self.pending = self.turn.send(results)
        except StopIteration as end:
            return self._text(end.value)
        return self._tool_calls(self.pending)

    def _text(self, text: str) -> Any:
        from tau2.data_model.message import UserMessage

        return UserMessage(role="user", content=text, cost=0.0)

    def _tool_calls(self, calls: list[Call]) -> Any:
        from tau2.data_model.message import ToolCall, UserMessage

        made = []
        for tool, arguments in calls:
            self.calls_made += 1
            made.append(ToolCall(id=f"user_{self.calls_made}", name=tool, arguments=arguments, requestor="user"))
        return UserMessage(role="user", content=None, tool_calls=made, cost=0.0)

    # -- one message of the agent ------------------------------------------------------------------------------------

    def _serve(self, text: str) -> Generator[list[Call], list[str], str]:
        """Yields batches of phone actions, receives their outputs, returns the answer to the agent."""
        if TRANSFERRED.search(text.lower()):
            return TRANSFER
        heard = self._recall_offers(parse(text, self.said))
        question, requests = self.mood.listen(text, find_topics(text[:LONGEST_HEARD].lower()), heard)
        if question:
            return question
        if not requests:
            return self._nothing_to_do()
        requests = self.mood.plan(self.scenario.issue, requests)
        if reads := self._reads(requests):
            yield reads
        before, answer = dict(self.facts), _Answer()
        requests = yield from self.mood.slip(self.facts, requests, answer)
        yield from self._do_all(requests, answer)
        return self._finish(requests, answer, before)

    def _recall_offers(self, requests: list[Request]) -> list[Request]:
        """The requests, with what was offered before in the place of a consent to something unnamed."""
        offers = [r for r in requests if r.topic in OFFERS and r.action != "do"]
        recalled = self.offered if self.offered and not offers else []
        self.offered = offers or self.offered
        others = [r for r in requests if r.topic != "consent"]
        if others == requests and others and not offers:  # the talk is about something else
            self.offered = []
        return others + recalled if len(others) < len(requests) and recalled else requests

    def _nothing_to_do(self) -> str:
        self.fruitless += 1
        return f"This isn't helping. Goodbye. {STOP}" if self.fruitless >= PATIENCE else "Okay. What should I do?"

    def _reads(self, requests: list[Request]) -> list[Call]:
        """Looks at every setting that decides what is to be done: a switch is never toggled blindly."""
        topics = [r.topic for r in requests if r.topic in TOGGLES and r.action != "check"]
        calls = [check_call(topic) for topic in topics]
        calls += [call for request in requests for call in self._settings_of(request.condition)]
        if any(r.key == ("payment", "do") for r in requests):
            calls.append(check_call("payment"))
        return _unique(calls)

    def _do_all(self, requests: list[Request], answer: _Answer) -> Generator[list[Call], list[str], None]:
        batch: list[Call] = []
        holds: dict[str, bool] = {"": True}  # each condition is decided once, when its turn comes
        for request in requests:
            condition = request.condition
            if condition not in holds:
                if looks := self._looks(condition, changed=not all(map(_is_read, batch))):
                    yield from self._flush([*batch, *looks])
                    batch = []
                holds[condition] = self._decide(condition, holds)
                answer.unmet += [] if holds[condition] else [condition]
            if holds[condition]:
                batch += self._calls_for(request, answer)
        yield from self._flush(_without_repeated_reads(batch))
        yield from self._flush(self._looks_again(requests, holds, answer))
        for condition in answer.unmet:
            answer.say(self._why_not(condition))
        for request in requests:
            if holds[request.condition]:
                self._report(request, answer)

    def _looks_again(self, requests: list[Request], holds: dict[str, bool], answer: _Answer) -> list[Call]:
        """The reads of settings that were reported on before they were changed: a report comes after what was done."""
        keys = [request.key for request in requests if holds[request.condition]]
        reset = ("apn", "check") in keys and ("apn", "do") in keys
        return [check_call("apn")] if reset and answer.done else []

    def _looks(self, condition: str, changed: bool) -> list[Call]:
        """What shows whether a condition holds now: a test of the outcome, and after a change the settings again."""
        if is_outcome(condition):
            return [self._outcome_test(condition)]
        return self._settings_of(condition) if changed else []

    def _settings_of(self, condition: str) -> list[Call]:
        topics = [topic for topic in find_topics(condition) if topic in CHECK_TOOLS]
        return _unique([check_call(topic) for topic in topics if topic not in ("speed", "mms")])

    def _decide(self, condition: str, holds: dict[str, bool]) -> bool:
        """Of "if" and "otherwise" one holds, whatever the first of them has changed since."""
        other = opposite(condition)
        return not holds[other] if other in holds else self._holds(condition)

    def _flush(self, batch: list[Call]) -> Generator[list[Call], list[str], None]:
        if batch:
            yield batch

    def _calls_for(self, request: Request, answer: _Answer) -> list[Call]:
        topic, action = request.key
        if topic == "resolved":
            return [check_call(_ISSUE_TESTS[self.scenario.issue])]
        if action in ("check", "agree"):
            return [check_call(topic)] if topic in CHECK_TOOLS and action == "check" else []
        if topic in TOGGLES:
            return self._switch(topic, action, answer)
        if topic == "payment":
            return self._pay(answer)
        answer.done = True
        self.changed[topic] = action
        if topic in ("restart", "apn"):
            self.facts["restarted"] = "yes" if topic == "restart" else ""
        return action_calls(topic, request.text)

    def _pay(self, answer: _Answer) -> list[Call]:
        """Once, however often a message asks for it."""
        if "payment" in answer.switched or not self.facts.get("request"):
            return []
        answer.switched.add("payment")
        return [("make_payment", {})]

    def _switch(self, topic: str, wanted: str, answer: _Answer) -> list[Call]:
        if self.facts.get(topic) == wanted:
            answer.say("" if topic in answer.switched else f"{SWITCHES[topic]} is already {wanted}")
            return []
        answer.done = True
        answer.switched.add(topic)
        answer.unsay(f"{SWITCHES[topic]} is already {self.facts.get(topic)}")
        self.changed[topic] = wanted
        self.facts[topic] = wanted  # until the phone says so itself
        return [switch_call(topic, wanted)]

    def _outcome_test(self, condition: str) -> Call:
        return check_call(
            "status_bar" if "status_bar" in find_topics(condition) else _ISSUE_TESTS[self.scenario.issue]
        )

    def _solved(self) -> bool:
        if self.scenario.issue == "service":
            return self.facts.get("signal", "none") != "none"
        if self.scenario.issue == "data":
            return "Excellent" in self.facts.get("speed", "")
        return self.facts.get("mms") == "yes"

    # -- conditions --------------------------------------------------------------------------------------------------

    def _holds(self, condition: str) -> bool:
        """Whether what an "if" says is so, as far as the phone shows it; an unknown condition counts as true."""
        if condition.startswith(NOT):
            return self._is_so(condition.removeprefix(NOT)) is not True
        return self._is_so(condition) is not False

    def _is_so(self, condition: str) -> bool | None:
        """Whether a condition is met; None where nothing in it can be looked up."""
        topics = find_topics(condition)
        if "abroad" in topics:
            return self.scenario.abroad != bool(_AT_HOME.search(condition))
        if is_outcome(condition):
            failed = self.facts.get("signal") == "none" if "status_bar" in topics else not self._solved()
            return failed == is_failure(condition)
        needs_all, said = parts(condition)
        found = [self._state_matches(topic, part, state(condition)) for part in said for topic in find_topics(part)]
        known = [match for match in found if match is not None]
        return (all(known) if needs_all else any(known)) if known else None

    def _state_matches(self, topic: str, said: str, wanted: str) -> bool | None:
        """Whether the phone is as `said`; wanted: the state that the whole condition speaks of."""
        facts, bad = self.facts, bool(_BAD.search(said))
        if topic in TOGGLES:
            wanted = state(said) or wanted
            return facts.get(topic) == wanted if wanted else None
        if topic == "sim":
            return (facts.get("sim") != "active") == bad if bad or _GOOD.search(said) else None
        if topic in ("status_bar", "network"):
            weak = ("none", "poor") if _WEAK.search(said) else ("none",)
            return (facts.get("signal") in weak) == (bad or len(weak) > 1)
        if topic == "mode":
            return self._mode_matches(said, bad)
        if topic == "permissions":
            return bool(self._missing_permissions()) == bad if bad or _GOOD.search(said) else None
        if topic == "apn":
            return (facts.get("mmsc") == "Not") == bad if bad or _GOOD.search(said) else None
        return None

    def _mode_matches(self, said: str, bad: bool) -> bool | None:
        named = set(re.findall(r"\b([2-5])g\b", said))
        if named and re.search(r"\b(lower|below|less|slower|older|under)\b", said):
            named |= {generation for generation in "2345" if generation < max(named)}
        return (self.facts.get("mode", "")[:1] in named) != bad if named else None

    def _why_not(self, condition: str) -> str:
        if "abroad" in find_topics(condition):
            return "I'm abroad" if self.scenario.abroad else "I'm not abroad"
        said = [self._say(topic) for topic in find_topics(condition)]
        return ", ".join(part for part in said if part)

    # -- the answer --------------------------------------------------------------------------------------------------

    def _report(self, request: Request, answer: _Answer) -> None:
        topic, action = request.key
        if topic in ("speed", "mms"):
            answer.tested = True
        if topic == "resolved":
            answer.tested = True
            topic = _ISSUE_TESTS[self.scenario.issue]
        if action == "agree":
            answer.say("yes, I'm willing to pay")
        elif action == "check":
            for part in self._statements(topic):
                answer.say(part)
        elif topic == "sim":
            answer.say(self._say("sim"))
        elif topic == "payment":
            paid = self.facts.get("paid")
            answer.say(f"I paid ${paid}" if paid else "I'm willing to pay, but I have no payment request")
        elif topic == "apn" and not self.facts.get("restarted"):
            answer.say("the APN reset applies at the next restart")

    def _statements(self, topic: str) -> list[str]:
        """What is said about a topic, in parts of which none is said twice in one answer."""
        if topic != "network":
            return [self._say(topic)]
        return [self._signal() if part == "signal" else self._say(part) for part in self.mood.network]

    def _say(self, topic: str) -> str:
        """What the customer says about a topic, from its scenario or from the phone's last outputs."""
        facts = self.facts
        if topic in SWITCHES:
            return f"{SWITCHES[topic]} is {facts.get(topic)}"
        if topic in _SCENARIO_TOPICS:
            return self._say_about_me(topic)
        if topic == "network":
            return ", ".join(self._statements(topic))
        if topic == "status_bar":
            return "airplane mode is on" if facts.get("airplane") == "on" else self._signal()
        if topic == "permissions":
            states = ("on" if p not in self._missing_permissions() else "off" for p in ("sms", "storage"))
            return "SMS permission is {}, storage permission is {}".format(*states)
        if topic == "apn":
            return f"APN is {facts.get('apn')}, MMSC is {'not set' if facts.get('mmsc') == 'Not' else 'set'}"
        return self._say_result(topic)

    def _say_result(self, topic: str) -> str:
        facts = self.facts
        if topic == "sim":
            return "SIM is " + facts.get("sim", "").replace("locked_pin", "locked with PIN").replace(
                "locked_puk", "locked with PUK"
            )
        if topic == "mode":
            return "network mode is " + _mode_name(facts.get("mode", ""))
        if topic == "speed":
            return "speed test: " + self._still("speed", _speed_words(facts.get("speed", "")))
        if topic == "mms":
            return "MMS works" if facts.get("mms") == "yes" else self._still("mms", "MMS fails")
        if topic == "payment":
            return (
                f"I have a payment request for {facts['request']} USD"
                if facts.get("request")
                else "no payment request"
            )
        if topic == "restart":
            return "I restarted the phone" if facts.get("restarted") else "I haven't restarted the phone yet"
        return f"my apps: {facts.get('apps')}" if topic == "apps" else ""

    def _say_about_me(self, topic: str) -> str:
        if topic == "identity":
            return f"I'm {self.scenario.name}, {self.scenario.phone}"
        if topic == "abroad":
            return f"I'm {self.scenario.location}" if self.scenario.location else "I'm at home"
        if topic in ("consent", "handover"):
            return "yes, please go ahead"
        if topic == "note":
            return "no"
        if topic == "refuel":
            return "yes, please refuel 2 GB" if self.scenario.refuels else "no, I don't want more data"
        return "I don't want to change my plan"

    def _signal(self) -> str:
        signal = self.facts.get("signal", "none")
        return self._still("signal", "no signal") if signal == "none" else f"signal is {signal}"

    def _still(self, what: str, words: str) -> str:
        """Mild frustration, in one word, when a failure is reported again."""
        if f"{what}:{words}" in self.failed_before:
            return f"still {words}"
        return words

    def _missing_permissions(self) -> list[str]:
        granted = self.facts.get("granted", "").split(", ")
        return [permission for permission in ("sms", "storage") if permission not in granted]

    def _finish(self, requests: list[Request], answer: _Answer, before: dict[str, str]) -> str:
        if answer.done and self.mood.tells_signal:
            self._add_signal(answer, before)
        parts = (["done"] if answer.done else []) + answer.parts
        text = _sentence(self.mood.words(parts, only_checked=all(r.action == "check" for r in requests)))
        self._remember_failures()
        if self._solved():
            return f"{text} Thank you! {STOP}"
        switched = [f"{SWITCHES[topic]} is {self.facts.get(topic)}" for topic in SWITCHES if topic in answer.switched]
        self.said = switched + answer.parts or self.said
        key = (tuple(r.key for r in requests), _sentence(parts), tuple(sorted(self.changed.items())))
        self.reported[key] += 1
        self.fruitless = 0 if text else self.fruitless + 1
        if max(self.reported[key], self.fruitless) >= PATIENCE:
            return f"{text} This isn't helping. Goodbye. {STOP}".strip()
        return text or "I can't do that."

    def _add_signal(self, answer: _Answer, before: dict[str, str]) -> None:
        signal = self.facts.get("signal")
        if signal == "none" or (signal and before.get("signal") == "none" and not answer.tested):
            answer.say(self._signal())

    def _remember_failures(self) -> None:
        facts = self.facts
        if facts.get("signal") == "none":
            self.failed_before.add("signal:no signal")
        if "No Connection" in facts.get("speed", ""):
            self.failed_before.add("speed:no connection")
        if facts.get("mms") == "no":
            self.failed_before.add("mms:MMS fails")


_SCENARIO_TOPICS = ("identity", "abroad", "refuel", "plan", "consent", "handover", "note")
# What a condition says of a thing that is neither on nor off.
_BAD = re.compile(r"\b(no|not|\w+n't|missing|absent|blank|empty|lost|unset|lacks?|lacking|denied|other than)\b")
_GOOD = re.compile(r"\b(active|set|present|inserted|granted|allowed|on|has|have|there|filled)\b")
_WEAK = re.compile(r"\b(weak|poor|low|bad)\b")
_AT_HOME = re.compile(r"\b(not|\w+n't)\b")


def _mode_name(mode: str) -> str:
    return "4G/5G" if mode == "4g_5g_preferred" else mode.replace("_", " ").replace("g ", "G ")


def _speed_words(speed: str) -> str:
    """ "275.00 Mbps (Excellent)" -> "275 Mbps, excellent"; "No Connection" -> "no connection"."""
    return re.sub(r"\.?0* Mbps \((.+)\)", r" Mbps, \1", speed).lower().replace("mbps", "Mbps")


def _unique(calls: list[Call]) -> list[Call]:
    return [call for index, call in enumerate(calls) if call not in calls[:index]]


def _without_repeated_reads(calls: list[Call]) -> list[Call]:
    """The calls without a read that follows the same read directly."""
    pairs = zip([None, *calls], calls, strict=False)
    return [call for before, call in pairs if call != before or not _is_read(call)]


def _is_read(call: Call) -> bool:
    return call[0].startswith(("check_", "run_", "can_"))


def _sentence(parts: list[str]) -> str:
    """["done", "no signal", "speed test: ..."] -> "Done, no signal, speed test: ..." """
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
