"""The customer of an episode: scripted (telecom) or recited (retail, airline; tau2_recited.py), both without a model
and a key, or any LLM through tau2's own user simulator.

The scripted customer sees its task's scenario and its own phone, nothing else. It maps ordinary wordings of an
instruction to the phone's tools, reports tersely what the tools say, and ends the call when its own problem is solved
or when the agent keeps getting nowhere. It is cooperative and literal: every number made with it names it. Harder
moods of it are in tau2_moods.py.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tau2_llm_customer import CONCURRENCY, DEFAULT_MODEL, LLMCustomer, UnusableCustomer
from tau2_moods import Mood, make_mood, problem_with

STOP, TRANSFER, OUT_OF_SCOPE = "###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###"
SCRIPTED_VERSION = "1"
PATIENCE = 3  # messages without anything to do, or repeats of one request with one answer, before hanging up


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
# What the agent asks for
# ---------------------------------------------------------------------------------------------------------------------

# Topic -> wording. Where two match at one place the earlier in this list wins.
_TOPICS = {
    "identity": r"\b(full name|your name|phone number|date of birth|customer id|who am i speaking)\b",
    "payment": r"\bpayment requests?\b|\bpay(ment|ments|ing)?\b|\bbills?\b",
    "refuel": (
        r"\brefuel\w*|\btop[- ]?up\b|\b(add|buy|purchase)\b[^.?!]*\b(gb|data)\b|\b(more|extra|additional) data\b"
    ),
    "plan": r"\b(change|switch|upgrade|another|different|new|higher)\b[^.,?!]*\bplans?\b",
    "airplane": r"\b(air ?plane|aeroplane|flight)[- ]?mode\b",
    "wifi_calling": r"\bwi-?fi[- ]calling\b",
    "wifi": r"\bwi-?fi\b",
    "roaming": r"\b(mobile |cellular )?(data )?roaming\b",
    "saver": r"\bdata[- ]?sav(er|ing)( mode)?\b|\bdata restrictions?\b|\blow data mode\b",
    "vpn": r"\bvpn\b|\bvirtual private network\b",
    "network": (
        r"\bnetwork status\b|\b(connection|cellular) status\b|\bnetwork connection\b"
        r"|\bcellular (service|connection)\b|\bconnection to the (cellular )?network\b"
    ),
    "mode": (
        r"\b(network|cellular) (mode|type|technology)( preference)?\b|\bnetwork preference\b"
        r"|\bpreferred network\w*( type)?|\btype of (cellular |mobile )?network\b|\b[2-5]g\b|\blte\b"
    ),
    "apn": r"\bapns?\b( settings?)?|\baccess point( name)?s?\b|\bmmsc\b( url)?",
    "permissions": r"\bpermissions?\b|\bstorage\b|\bsms\b",
    "speed": r"\bspeed ?-?tests?\b|\binternet speed\b|\btest (your|the) (\w+ )?(speed|connection)\b|\bhow fast\b",
    "mms": (
        r"\bmms\b|\b(picture|multimedia|photo|group) messag\w+"
        r"|\bsend(ing)?( me)? (a |an )?(test )?(picture|photo|image)\b"
    ),
    "restart": r"\b(restart|reboot|power[- ]?cycle)\w*",
    "sim": r"\bsim\b( card)?",
    "status_bar": (
        r"\bstatus bar\b|\bsignal\b|\bbars\b|\b(have|has|get|getting|any|no|is|see|your|phone|cell) service\b"
    ),
    "data": (
        r"\b(mobile|cellular|cell|your|the) data\b(?! (usage|plan|limit|speed))"
        r"|\bdata (connection|is|on|off|switch)\b|(?<=turn on )data\b|(?<=turn off )data\b|(?<=enable )data\b"
    ),
    "apps": r"\b(installed apps|which apps|list of apps)\b",
    "abroad": (
        r"\babroad\b|\btravel+ing\b|\boverseas\b|\boutside (of )?(your|the|home)\b|\bwhere are you\b|\blocation\b"
    ),
    "resolved": (
        r"\b(working|work|works|fixed|resolved|solved|restored|better)\b[^.!]*\bnow\b|\bnow (working|fixed|resolved)\b"
        r"|\b(issue|problem)\b[^.!]*\b(fixed|resolved|solved|persists?)\b|\banything else\b"
        r"|\bshould (now )?(be |have )?(work\w*|restored|fixed|back|fine)\b"
        r"|\bdid (that|it) (help|work)\b|\b(is|does) (it|that|everything) work(ing)?\b"
    ),
}
_TOPIC_PATTERNS = {topic: re.compile(pattern) for topic, pattern in _TOPICS.items()}
_TOGGLES = ("airplane", "data", "roaming", "saver", "vpn", "wifi", "wifi_calling")

# Wordings that span several clauses, brought to one phrase before the text is cut into clauses.
_PHONE = r"(your |the )?(phone|device|handset|it)"
_BACK_ON = r",?( and| then)+( turn| switch| power)?( it)?( back)? on( again)?"
_BACK_IN = r"(re-?insert\w*|(put|plac|insert)\w*( it)?( back| again)?( in\b)?( again)?)"
_PHRASES = [
    (rf"\b(turn|switch|power)(ing)? {_PHONE}( completely)? off{_BACK_ON}", "restart"),
    (rf"\b(turn|switch|power)(ing)? off {_PHONE}{_BACK_ON}", "restart"),
    (
        rf"\b(remov\w+|(take|taking|pull|pop)\w* out|eject\w*) (your |the )?sim( card)?[^.;]*?\b{_BACK_IN}",
        "reseat sim",
    ),
    (rf"\b(take|taking|pull\w*|pop\w*) (your |the )?sim( card)? out[^.;]*?\b{_BACK_IN}", "reseat sim"),
    (r"\boff,?( and| then)+( back)? on\b( again)?", "off, turn it on"),
    (r"\bon,?( and| then)+( back)? off\b( again)?", "on, turn it off"),
]
_RESEAT = re.compile(
    r"\bre-?seat\w*|\bre-?insert\w*|\bremov\w+|\btake out\b|\bput\b.*\bback\b|\beject\w*|\bre-?install\w*"
)
_GRANT = re.compile(r"\b(grant|allow|give|add|approve)\w*")
_RESET = re.compile(r"\b(re-?set|restore)\w*|\bto default\b")
_PAY = re.compile(r"\bpay\b|\b(make|accept|complete|approve|authori[sz]e)\w*\b.*\bpayment\b|\bmake it\b|\baccept it\b")
_SET = re.compile(r"\b(set|change|switch|select|choose|use|put|update|move)\b")
_CHECK = re.compile(
    r"\b(check|look|see|tell|show|verify|confirm|view|report|read|test|run|re-?run|try|retry|send|let me know)\b"
)
_ASKS_WHETHER = re.compile(
    r"\b(check|see|verify|confirm|tell me|know|ask|wondering) (if|whether|that)\b|\bwhether\b|\bdouble[- ]check\b"
)
_WANTS_STATE = re.compile(r"\b(make sure|ensure|should be|must be|needs? to be|has to be|be set|keep|leave)\b")
_TURN = re.compile(r"\b(turn|turning|switch|switching|toggle|flip|put|set|enable|disable|activate|deactivate)\b")
_OFF = re.compile(r"\b(disable|deactivate|disconnect|exit|quit)\w*|\bstop using\b")
_ON = re.compile(r"\b(enable|activate|connect)\b|\breconnect\b")
_IS_IT = re.compile(r"\b(is|are|isn't|do you have|does)\b")
_NEVER = re.compile(r"\b(don't|do not|never|no need to|avoid|without)\b")
_FIRST_PERSON = re.compile(r"^(so |but |now |first |okay |ok )*(i|we|i'm|i've|i'll|we've|we'll|i'd|let me)\b")
_TO_YOU = re.compile(r"\b(you to|please|can we|could we|shall we)\b|\?")
_PRONOUN = re.compile(r"\b(it|that|this|them|those|both|these)\b")
TRANSFERRED = re.compile(
    r"being transferred|have been transferred|(am|are|i'm|we're) transferring you|transferring you (now )?to"
)


@dataclass
class Request:
    """One thing asked of the customer: a topic, what to do with it ("check", "on", "off" or "do"), and a condition."""

    topic: str
    action: str
    text: str = ""
    condition: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.topic, self.action


def parse(text: str) -> list[Request]:
    """The requests in an agent's message, in its order. Text that asks for nothing gives an empty list."""
    found: list[Request] = []
    recent: Sequence[str] = ()  # topics that "it" or "them" may stand for
    for sentence in _sentences(_spoken(text)):
        condition, act = _split_condition(sentence)
        if condition:
            recent = _topics(condition) or recent
        requests, recent = _parse_sentence(act, recent)
        for request in requests:
            request.condition = condition
            if all(request.key != other.key or request.text != other.text for other in found):
                found.append(request)
    return _merged(found)


def _spoken(text: str) -> str:
    """The text without what nobody says on the phone: tags, JSON and names of functions are no instructions."""
    text = re.sub(r"<tool_call>.*?(</tool_call>|$)|<[^<>]*>", " ", text, flags=re.DOTALL)
    while (plain := re.sub(r"\{[^{}]*\}", " ", text)) != text:
        text = plain
    text = text.partition("{")[0]
    return re.sub(r"\b(?![2-5]g_)\w*[^\W_]_\w*", " ", text, flags=re.IGNORECASE)


def _sentences(text: str) -> list[str]:
    text = re.sub(r"[’`]", "'", text.lower())
    text = re.sub(r"\n\s*(\d+[.)]|[-*•])\s*", ", ", "\n" + text)
    text = re.sub(r"[()\"“”*]", " , ", text)
    text = re.sub(r"\s+", " ", text.replace("–", "-").replace("—", ", "))
    for pattern, phrase in _PHRASES:
        text = re.sub(pattern, phrase, text)
    sentences = re.findall(r"[^.!?;]*(?:\.(?=\S)[^.!?;]*)*[.!?;]?", text)
    pieces = [piece for s in sentences for piece in re.split(r",\s*(?:and |but )?(?=if\b)|\band (?=if\b)", s)]
    return [piece.strip(" ,") for piece in pieces if piece.strip(" ,.!;")]


def _split_condition(sentence: str) -> tuple[str, str]:
    """("data saver is on", "turn it off") of "if data saver is on, turn it off" and of "turn it off if ..."."""
    if _ASKS_WHETHER.search(sentence) or " if " not in f" {sentence}":
        return "", sentence
    before, _, after = f" {sentence} ".partition(" if ")
    if _verb(before) or _topics(before):
        return after.strip(" .?"), before.strip()
    condition, comma, act = after.partition(",")
    if not comma:
        condition, _, act = after.partition(" then ") if " then " in after else after.partition(" please ")
    return condition.strip(), act.strip()


def _parse_sentence(sentence: str, recent: Sequence[str]) -> tuple[list[Request], Sequence[str]]:
    requests: list[Request] = []
    clauses = re.split(r",|:|\band\b|\bthen\b|\balso\b|\bplus\b|&|\bor\b|\bafterwards\b", sentence)
    verb = "check" if sentence.endswith("?") else ""
    mentioned: list[str] = []
    wants_state = False  # "make sure that A is off, B is on and C is 5G": each is a wish of its own
    for index, clause in enumerate(clauses):
        topics = _topics(clause)
        wants_state = wants_state or bool(_WANTS_STATE.search(clause))
        if _NEVER.search(clause) or (_FIRST_PERSON.search(clause.strip()) and not _TO_YOU.search(clause)):
            mentioned += topics
            verb = ""
            continue
        own = _verb(clause)
        if not own and wants_state and _IS_IT.search(clause):
            own = _direction(clause) or "set"
        if own in ("on", "off") and sentence.endswith("?") and _IS_IT.search(clause):
            own = "check"
        if own == "turn":
            own = next(filter(None, (_direction(c) for c in clauses[index:])), "") or "on"
        verb = own or verb
        if not topics and own and _PRONOUN.search(clause):
            pool = mentioned or recent
            topics = pool[-1:] if not re.search(r"\b(them|those|both|these)\b", clause) else pool
        requests += [
            Request(topic, _action(topic, verb, clause), clause) for topic in topics if verb or topic == "resolved"
        ]
        mentioned += topics
    return requests, (mentioned or recent)


@functools.lru_cache(maxsize=1024)  # agents repeat themselves
def _topics(text: str) -> tuple[str, ...]:
    """Topics in the order in which the text names them; a place belongs to one topic only."""
    places: list[tuple[int, int, str]] = []
    for topic, pattern in _TOPIC_PATTERNS.items():
        for match in pattern.finditer(text):
            if all(match.end() <= start or match.start() >= end for start, end, _ in places):
                places.append((match.start(), match.end(), topic))
    return tuple(dict.fromkeys(topic for _, _, topic in sorted(places)))


def _direction(clause: str) -> str:
    match = re.search(r"\b(on|off)\b", clause)
    return match.group(1) if match else ""


def _verb(clause: str) -> str:
    """What a clause asks for: reseat, grant, reset, restart, pay, off, on, turn (on or off?), set, check or ""."""
    if _ASKS_WHETHER.search(clause):
        return "check"
    for verb, pattern in (("reseat", _RESEAT), ("grant", _GRANT), ("reset", _RESET), ("pay", _PAY)):
        if pattern.search(clause):
            return verb
    if _TOPIC_PATTERNS["restart"].search(clause):
        return "restart"
    if _OFF.search(clause):
        return "off"
    if _ON.search(clause):
        return "on"
    direction = _direction(clause)
    if _TURN.search(clause) and re.search(r"\b(turn|switch|toggle|flip|put)", clause):
        return direction or "turn"
    if _WANTS_STATE.search(clause):
        return direction or "check"
    if _SET.search(clause):
        return "set"
    if _CHECK.search(clause):
        return "check"
    return "" if _IS_IT.search(clause) else direction


def _action(topic: str, verb: str, clause: str) -> str:
    if topic in _TOGGLES:
        return verb if verb in ("on", "off") else "check"
    if topic == "sim":
        return "do" if verb == "reseat" else "check"
    if topic == "apn":
        return "do" if verb == "reset" else "check"
    if topic == "permissions":
        return "do" if verb in ("grant", "on", "set") else "check"
    if topic == "mode":
        return "do" if verb in ("set", "on", "turn", "reset") or _SET.search(clause) else "check"
    if topic == "payment":
        return "do" if verb == "pay" else "check"
    return "do" if topic == "restart" else "check"


def _merged(requests: list[Request]) -> list[Request]:
    """One request per topic, action and condition: "storage" and "SMS" named apart belong together. A check of
    something that is also to be changed is left out: the change reports the state anyway."""
    merged: dict[tuple, Request] = {}
    for request in requests:
        key = (*request.key, request.condition)
        if key in merged:
            merged[key].text += " " + request.text
        else:
            merged[key] = request
    changed = {r.topic for r in merged.values() if r.action != "check"} - {"payment", "apn"}
    return [r for r in merged.values() if r.action != "check" or r.topic not in changed]


# ---------------------------------------------------------------------------------------------------------------------
# The phone
# ---------------------------------------------------------------------------------------------------------------------

_TOGGLE_TOOLS = {
    "airplane": "toggle_airplane_mode",
    "data": "toggle_data",
    "roaming": "toggle_roaming",
    "saver": "toggle_data_saver_mode",
    "wifi": "toggle_wifi",
    "wifi_calling": "toggle_wifi_calling",
}
_CHECK_TOOLS = {
    "airplane": "check_network_status",
    "data": "check_network_status",
    "roaming": "check_network_status",
    "network": "check_network_status",
    "status_bar": "check_status_bar",
    "sim": "check_sim_status",
    "saver": "check_data_restriction_status",
    "vpn": "check_vpn_status",
    "mode": "check_network_mode_preference",
    "apn": "check_apn_settings",
    "wifi": "check_wifi_status",
    "wifi_calling": "check_wifi_calling_status",
    "permissions": "check_app_permissions",
    "apps": "check_installed_apps",
    "payment": "check_payment_request",
    "speed": "run_speed_test",
    "mms": "can_send_mms",
}
_NAMES = {
    "airplane": "airplane mode",
    "data": "mobile data",
    "roaming": "roaming",
    "saver": "Data Saver",
    "vpn": "VPN",
    "wifi": "Wi-Fi",
    "wifi_calling": "Wi-Fi calling",
}
_ISSUE_TESTS = {"service": "status_bar", "data": "speed", "mms": "mms"}
_MESSAGING = {"app_name": "messaging"}
Call = tuple[str, dict[str, Any]]


def read_phone(tool: str, output: str) -> dict[str, str]:
    """Facts that one tool output states, for example {"airplane": "off", "signal": "good"}."""
    facts: dict[str, str] = {}
    if "Status Bar:" in output:
        facts |= _read_status_bar(output.split("Status Bar:", 1)[1])
    for topic, label in (("airplane", "Airplane Mode"), ("data", "Mobile Data"), ("roaming", "Data Roaming")):
        facts |= _read_switch(topic, label, output)
    for topic, label in (("saver", "Data Saver [Mm]ode"), ("wifi_calling", "Wi-Fi Calling"), ("vpn", "VPN")):
        facts |= _read_switch(topic, label, output)
    if match := re.search(r"^Wi-Fi(?: Radio:)?(?: is(?: now| turned)?)? (ON|OFF)", output, re.M):
        facts["wifi"] = match[1].lower()
    for fact, pattern in _READ.items():
        if match := re.search(pattern, output):
            facts[fact] = match[1]
    return facts | _read_special(tool, output)


_READ = {
    "sim": r"SIM Card Status: (\w+)",
    "signal": r"Cellular Signal: (\w+)",
    "mode": r"Network Mode (?:Preference|set to): (\w+)",
    "apn": r"APN Name: (\S+)",
    "mmsc": r"MMSC URL[^:]*: (\S+)",
    "speed": r"Speed (?:Test Result|test failed): (.+?)\.(?: |$)",
    "request": r"payment request for (bill \S+ of \S+)",
    "paid": r"Payment of (\S+) USD has been made",
    "apps": r"apps are installed on the phone: (.+)",
    "granted": r"has permission for: (.+?)\.",
}


def _read_switch(topic: str, label: str, output: str) -> dict[str, str]:
    match = re.search(rf"{label}(?: Enabled)?(?::| is)?(?: now| currently| turned)* (ON|OFF|Yes|No)\b", output)
    return {topic: "on" if match[1] in ("ON", "Yes") else "off"} if match else {}


def _read_status_bar(bar: str) -> dict[str, str]:
    if "Airplane Mode" in bar:
        return {"signal": "none", "airplane": "on"}
    strength = re.search(r"No Signal|Poor|Fair|Good|Excellent", bar)
    signal = "none" if strength is None or strength[0] == "No Signal" else strength[0].lower()
    return {"signal": signal, "airplane": "off", "bar_data": "on" if "Data Enabled" in bar else "off"}


def _read_special(tool: str, output: str) -> dict[str, str]:
    if tool == "check_sim_status" and "No SIM card" in output:
        return {"sim": "missing"}
    if tool == "check_sim_status":
        locked = re.search(r"locked with a (PIN|PUK)", output)
        return {"sim": f"locked_{locked[1].lower()}" if locked else "active"}
    if tool == "can_send_mms":
        return {"mms": "no" if "cannot" in output else "yes"}
    if tool == "disconnect_vpn":
        return {"vpn": "off"}
    if tool == "connect_vpn":
        return {"vpn": "on" if "No VPN" not in output else "off"}
    if tool == "check_app_permissions" and "no permissions" in output:
        return {"granted": ""}
    if tool == "check_payment_request" and "No payment" in output:
        return {"request": ""}
    if tool == "make_payment" and "do not have" in output:
        return {"paid": ""}
    return {}


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

    def say(self, part: str) -> None:
        if part and part not in self.parts:
            self.parts.append(part)


class ScriptedCustomer:
    """A cooperative customer without a language model. Deterministic, given its mood."""

    def __init__(self, user_scenario: Any, mood: Mood | None = None) -> None:
        self.scenario, self.mood = Scenario.read(user_scenario), mood or Mood()
        self.facts: dict[str, str] = {}
        self.reported: Counter[tuple] = Counter()
        self.fruitless = 0
        self.failed_before: set[str] = set()
        self.opened = False
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
        question, requests = self.mood.listen(text, _topics(text.lower()), parse(text))
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

    def _nothing_to_do(self) -> str:
        self.fruitless += 1
        return f"This isn't helping. Goodbye. {STOP}" if self.fruitless >= PATIENCE else "Okay. What should I do?"

    def _reads(self, requests: list[Request]) -> list[Call]:
        """Looks at every setting that decides what is to be done: a switch is never toggled blindly."""
        topics = [r.topic for r in requests if r.topic in _TOGGLES and r.action != "check"]
        topics += [
            t for r in requests for t in _topics(r.condition) if t in _CHECK_TOOLS and t not in ("speed", "mms")
        ]
        if any(r.key == ("payment", "do") for r in requests):
            topics.append("payment")
        return _unique([_check_call(topic) for topic in topics])

    def _do_all(self, requests: list[Request], answer: _Answer) -> Generator[list[Call], list[str], None]:
        batch: list[Call] = []
        holds: dict[str, bool] = {"": True}  # each condition is decided once, when its turn comes
        for request in requests:
            condition = request.condition
            if condition not in holds and _is_outcome(condition):
                yield from self._flush([*batch, self._outcome_test(condition)])
                batch = []
            if condition not in holds:
                holds[condition] = self._holds(condition)
                answer.say("" if holds[condition] else self._why_not(condition))
            if holds[condition]:
                batch += self._calls_for(request, answer)
        yield from self._flush(_without_repeated_reads(batch))
        for request in requests:
            if holds[request.condition]:
                self._report(request, answer)

    def _flush(self, batch: list[Call]) -> Generator[list[Call], list[str], None]:
        if batch:
            yield batch

    def _calls_for(self, request: Request, answer: _Answer) -> list[Call]:
        topic, action = request.key
        if topic == "resolved":
            return [_check_call(_ISSUE_TESTS[self.scenario.issue])]
        if action == "check":
            return [_check_call(topic)] if topic in _CHECK_TOOLS else []
        if topic in _TOGGLES:
            return self._switch(topic, action, answer)
        if topic == "payment":
            return [("make_payment", {})] if self.facts.get("request") else []
        answer.done = True
        return _action_calls(topic, request.text)

    def _switch(self, topic: str, wanted: str, answer: _Answer) -> list[Call]:
        if self.facts.get(topic) == wanted:
            answer.say(f"{_NAMES[topic]} is already {wanted}")
            return []
        answer.done = True
        self.facts[topic] = wanted  # until the phone says so itself
        if topic == "vpn":
            return [("connect_vpn" if wanted == "on" else "disconnect_vpn", {})]
        return [(_TOGGLE_TOOLS[topic], {})]

    def _outcome_test(self, condition: str) -> Call:
        return _check_call("status_bar" if "status_bar" in _topics(condition) else _ISSUE_TESTS[self.scenario.issue])

    def _solved(self) -> bool:
        if self.scenario.issue == "service":
            return self.facts.get("signal", "none") != "none"
        if self.scenario.issue == "data":
            return "Excellent" in self.facts.get("speed", "")
        return self.facts.get("mms") == "yes"

    # -- conditions --------------------------------------------------------------------------------------------------

    def _holds(self, condition: str) -> bool:
        """Whether what an "if" says is so, as far as the phone shows it; an unknown condition counts as true."""
        topics = _topics(condition)
        if "abroad" in topics:
            return self.scenario.abroad
        if _is_outcome(condition):
            return self.facts.get("signal") == "none" if "status_bar" in topics else not self._solved()
        return all(self._state_matches(topic, condition) for topic in topics)

    def _state_matches(self, topic: str, condition: str) -> bool:
        bad = bool(re.search(r"\b(no|not|isn't|missing|absent|blank|empty|lost|unset|lacks?|lacking)\b", condition))
        if topic in _TOGGLES:
            on = bool(re.search(r"\b(on|enabled|active|connected|activated)\b", condition))
            off = bool(re.search(r"\b(off|disabled|inactive|disconnected|deactivated)\b", condition))
            wanted = "on" if (on and not bad) or (off and bad) else "off"
            return self.facts.get(topic) == wanted if on or off else True
        if topic == "sim":
            return self.facts.get("sim") != "active" if bad else True
        if topic in ("status_bar", "network"):
            return (self.facts.get("signal") == "none") == bad
        if topic == "mode":
            slow = re.search(r"\b([23])g\b", condition)
            return slow is None or self.facts.get("mode", "").startswith(slow[1])
        if topic == "permissions":
            return bool(self._missing_permissions()) if bad else True
        if topic == "apn":
            return self.facts.get("mmsc") == "Not" if bad else True
        return True

    def _why_not(self, condition: str) -> str:
        if "abroad" in _topics(condition):
            return "I'm not abroad"
        said = [self._say(topic) for topic in _topics(condition)]
        return ", ".join(part for part in said if part)

    # -- the answer --------------------------------------------------------------------------------------------------

    def _report(self, request: Request, answer: _Answer) -> None:
        topic, action = request.key
        if topic in ("speed", "mms"):
            answer.tested = True
        if topic == "resolved":
            answer.tested = True
            topic = _ISSUE_TESTS[self.scenario.issue]
        if action == "check":
            answer.say(self._say(topic))
        elif topic == "sim":
            answer.say(self._say("sim"))
        elif topic == "payment":
            paid = self.facts.get("paid")
            answer.say(f"I paid ${paid}" if paid else "I'm willing to pay, but I have no payment request")
        elif topic == "apn" and not any(tool == "reboot_device" for tool, _ in self.pending):
            answer.say("the APN reset applies at the next restart")

    def _say(self, topic: str) -> str:
        """What the customer says about a topic, from its scenario or from the phone's last outputs."""
        facts = self.facts
        if topic in _NAMES:
            return f"{_NAMES[topic]} is {facts.get(topic)}"
        if topic in _SCENARIO_TOPICS:
            return self._say_about_me(topic)
        if topic == "network":
            return ", ".join(self._signal() if part == "signal" else self._say(part) for part in self.mood.network)
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
        return f"my apps: {facts.get('apps')}" if topic == "apps" else ""

    def _say_about_me(self, topic: str) -> str:
        if topic == "identity":
            return f"I'm {self.scenario.name}, {self.scenario.phone}"
        if topic == "abroad":
            return f"I'm {self.scenario.location}" if self.scenario.location else "I'm at home"
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
        key = (tuple(r.key for r in requests), _sentence(parts))
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


_SCENARIO_TOPICS = ("identity", "abroad", "refuel", "plan")


def _check_call(topic: str) -> Call:
    return _CHECK_TOOLS[topic], (_MESSAGING if topic == "permissions" else {})


def _action_calls(topic: str, text: str) -> list[Call]:
    """Phone actions for everything that is neither a switch nor a payment."""
    if topic == "sim":
        return [("reseat_sim_card", {}), ("check_sim_status", {})]
    if topic == "apn":
        return [("reset_apn_settings", {})]
    if topic == "mode":
        return [("set_network_mode_preference", {"mode": _wanted_mode(text)})]
    if topic == "permissions":
        named = [p for p in ("storage", "sms") if p in text] or ["storage", "sms"]
        return [("grant_app_permission", {**_MESSAGING, "permission": permission}) for permission in named]
    return [("reboot_device", {})]


def _wanted_mode(text: str) -> str:
    named = set(re.findall(r"\b([2-5])g\b", text))
    if named and named <= {"2", "3"}:
        return f"{max(named)}g_only"
    return "4g_only" if "4g only" in text else "4g_5g_preferred"


def _mode_name(mode: str) -> str:
    return "4G/5G" if mode == "4g_5g_preferred" else mode.replace("_", " ").replace("g ", "G ")


def _speed_words(speed: str) -> str:
    """ "275.00 Mbps (Excellent)" -> "275 Mbps, excellent"; "No Connection" -> "no connection"."""
    return re.sub(r"\.?0* Mbps \((.+)\)", r" Mbps, \1", speed).lower().replace("mbps", "Mbps")


def _is_outcome(condition: str) -> bool:
    return bool(
        re.search(r"\b(still|doesn't|does not|not work\w*|fails?|persists?|no luck|didn't|unresolved)\b", condition)
    )


def _unique(calls: list[Call]) -> list[Call]:
    return [call for index, call in enumerate(calls) if call not in calls[:index]]


def _without_repeated_reads(calls: list[Call]) -> list[Call]:
    """Without a read that follows the same read directly."""
    reads = ("check_", "run_", "can_")
    pairs = zip([None, *calls], calls, strict=False)
    return [call for before, call in pairs if call != before or not call[0].startswith(reads)]


def _sentence(parts: list[str]) -> str:
    """["done", "no signal", "speed test: ..."] -> "Done, no signal, speed test: ..." """
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""
