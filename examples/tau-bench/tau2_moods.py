"""Moods of the scripted customer: how it speaks and mishears, on top of what it knows and does (tau2_users.py).

A library: `--user-args '{"mood": "rambling"}'` of evaluate_tau2.py and teacher_traces.py, `tau2_user_args: {mood:
rambling}` in the YAML of rollouts, `--mood` of tau2_teacher.py.

    plain      the customer as it always was
    terse      says no more than was asked: no number and no place before they are asked for, no signal
    rambling   chatter, numbers that are not its phone number, other names for settings
    misreads   once: reports one setting wrongly (and rightly when asked again), or does not do one of the things that
               it was asked to, but flips Wi-Fi and back, and says so
    eager      restarts, or switches something else on, unasked, at most once each, and says so
    asks_back  at the first checks and at the first changes: asks where to find one of them, does nothing yet, and does
               it all as soon as the agent says the thing's name again or explains
    persona    drawn per (task, seed) by the task's persona: see PERSONA_MOODS
    mixed      drawn per (task, seed) from the first six

Every draw comes from (task id, seed). No mood lies for good: each kind of trouble happens at most once or twice, and
the customer says what an attentive agent needs to mend it.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Generator, Sequence
from typing import Any

MOOD_VERSION = "2"
MOODS = ("plain", "terse", "rambling", "misreads", "eager", "asks_back")
CHOICES = (*MOODS, "persona", "mixed")
# tau2's personas: Easy is friendly, asks questions and gives detailed feedback; Hard gets confused by instructions and
# technical terms and shares information only when asked.
PERSONA_MOODS = {"None": ("plain", "eager"), "Easy": ("rambling", "asks_back"), "Hard": ("terse", "misreads")}
Batches = Generator[list, list, list]

# What the moods call the things that they speak of.
_NAMES = {
    "airplane": "airplane mode",
    "data": "mobile data",
    "roaming": "roaming",
    "saver": "Data Saver",
    "vpn": "the VPN",
    "wifi_calling": "Wi-Fi calling",
    "mode": "the network mode",
    "permissions": "the app permissions",
    "apn": "the APN settings",
    "network": "the network status",
}
_MIXED_UP = ("airplane", "data", "roaming", "saver", "vpn", "wifi_calling", "mode")  # with Wi-Fi
# What the eager customer switches on: it looks helpful, and it is in the way of the issue.
_SWITCHES = {"service": ("airplane",), "data": ("vpn", "saver"), "mms": ("wifi_calling",)}
_OPPOSITE = {"on": "off", "off": "on", "set": "not set", "not set": "set", "4G/5G": "2G only"}
# The plain customer's words, and those of others.
_SHORT = [
    (r"^done$", "ok"),
    (r"\bairplane mode is\b", "airplane"),
    (r"\bmobile data is\b", "data"),
    (r"\bData Saver is\b", "saver"),
    (r"\bSIM is active\b", "SIM ok"),
    (r"\bSIM is\b", "SIM"),
    (r"\b(roaming|VPN|Wi-Fi|Wi-Fi calling|signal) is\b", r"\1"),
    (r"\bnetwork mode is\b", "mode"),
    (r"\b(SMS|storage) permission is\b", r"\1"),
    (r"\bAPN is internet, ", ""),
    (r"\bAPN is\b", "APN"),
    (r"\bMMSC is not set\b", "no MMSC"),
    (r"\bMMSC is set\b", "MMSC ok"),
    (r"\bspeed test: ", ""),
    (r"\bMMS fails\b", "MMS failed"),
    (r"\bstill ", ""),
    (r"^(yes|no), .*", r"\1"),
    (r"^I have a payment request for ", "request: "),
    (r"^I'm (?!willing)(.+)", r"\1"),
]
_OTHER_NAMES = [
    (r"\bairplane mode\b", "flight mode"),
    (r"\bmobile data\b", "cellular data"),
    (r"\bData Saver\b", "data saving mode"),
    (r"\bnetwork mode is\b", "the preferred network is"),
    (r"\bWi-Fi calling\b", "calling over Wi-Fi"),
    (r"\b(SMS|storage) permission is\b", r"the permission for \1 is"),
    (r"\bMMSC is not set\b", "the MMSC field is empty"),
    (r"\bMMSC is set\b", "the MMSC field is filled in"),
    (r"\bno signal\b", "no bars"),
    (r"\bSIM is missing\b", "it says there is no SIM card"),
    (r"\bMMS fails\b", "the picture message failed"),
    (r"\bspeed test: ", "the speed test says "),
]

_COMPLAINTS = {
    "service": (
        "My phone shows No Service.",
        "I have no service at all, I can't make calls.",
        "My phone has been without a network for hours.",
    ),
    "data": (
        "My mobile data is slow or not working, I want excellent speed.",
        "The internet on my phone hardly works, and I want excellent speed.",
        "Mobile data keeps stopping or crawls, I need it at excellent speed.",
    ),
    "mms": (
        "I can't send MMS messages.",
        "Picture messages don't go out from my phone.",
        "My messaging app won't send pictures.",
    ),
}
_SHORT_COMPLAINTS = {
    "service": ("No service.", "No network on my phone."),
    "data": ("Mobile data bad, want excellent speed.", "Internet slow, want excellent speed."),
    "mms": ("MMS won't send.", "Can't send pictures."),
}


def problem_with(args: dict[str, Any]) -> str:
    """What is wrong with the scripted customer's settings; "" when nothing is."""
    if unknown := [str(name)[:40] for name in args if name != "mood"]:
        return f"the scripted customer knows no setting {', '.join(unknown)}; its only one is mood"
    if (mood := args.get("mood", "plain")) not in CHOICES:
        return f"unknown mood {str(mood)[:40]!r} of the scripted customer; choose one of: {', '.join(CHOICES)}"
    return ""


def make_mood(chosen: str, task_id: str, seed: int) -> Mood:
    """The mood that `chosen` stands for in one episode."""
    name, rng = chosen, random.Random(f"{task_id}:{seed}:{chosen}")
    if chosen == "persona":
        persona = re.search(r"\[PERSONA:(\w+)\]$", task_id)
        name = rng.choice(PERSONA_MOODS.get(persona[1] if persona else "None", ("plain",)))
    if chosen == "mixed":
        name = rng.choice(MOODS)
    return _CLASSES[name](chosen, rng)


def describe(chosen: str) -> dict[str, Any]:
    """{"mood", "mood_version"} of the setting `chosen`; {} for plain."""
    return {} if chosen == "plain" else {"mood": chosen, "mood_version": MOOD_VERSION}


class Mood:
    """Plain: every hook leaves things as they are. `chosen` is the setting, `name` what it came to."""

    name = "plain"
    network = ("airplane", "sim", "signal", "data", "roaming")  # what a look at the network status is told as
    tells_signal = True  # after a change, unasked

    def __init__(self, chosen: str = "plain", rng: random.Random | None = None) -> None:
        self.chosen, self.rng = chosen, rng or random.Random(0)

    def describe(self) -> dict[str, Any]:
        """What a number has to be read with; `drawn` differs between the episodes of one evaluation."""
        drawn = {"drawn": self.name} if self.chosen != self.name else {}
        return {**describe(self.chosen), **drawn}

    def opening(self, scenario: Any) -> str:
        return scenario.opening if self.chosen == "plain" else self._varied_opening(scenario)

    def _varied_opening(self, scenario: Any) -> str:
        """The complaint, who calls and where from, in a drawn order and wording."""
        complaint = self.rng.choice(_COMPLAINTS[scenario.issue])
        who = self.rng.choice((f"I'm {scenario.name}, {scenario.phone}", f"{scenario.name} here, {scenario.phone}"))
        who += f", {scenario.location}." if scenario.abroad else "."
        return " ".join(self.rng.sample([complaint, who], 2))

    def listen(self, text: str, topics: Sequence[str], requests: list) -> tuple[str, list]:
        """(what is asked back instead of doing anything, or "", the requests that are taken up)."""
        return "", requests

    def plan(self, issue: str, requests: list) -> list:
        """The requests with what this customer does beside them."""
        return requests

    def slip(self, facts: dict[str, str], requests: list, answer: Any) -> Batches:
        """The requests without what is not done this time, after the phone actions that are done instead."""
        return requests
        yield

    def words(self, parts: list[str], only_checked: bool) -> list[str]:
        """What is said for the plain customer's statements."""
        return parts


class Terse(Mood):
    name = "terse"
    network = ("airplane", "sim", "signal")
    tells_signal = False

    def opening(self, scenario: Any) -> str:
        return self.rng.choice(_SHORT_COMPLAINTS[scenario.issue])

    def words(self, parts: list[str], only_checked: bool) -> list[str]:
        told = [part for part in parts if " is already " not in part] or (["ok"] if parts else [])
        return [_rewritten(part, _SHORT) for part in told]


class Rambling(Mood):
    name = "rambling"
    CHATTERS = 3  # answers with chatter; the opening has its own
    _HELLOS = (
        "Hello, thanks for picking up, I waited 15 minutes.",
        "Hi, I hope you can help, I bought this phone in 2021.",
        "Good day, it's my second call, ticket 48213 I think.",
    )
    _DECOYS = (
        "My husband's number is {}, his phone is fine.",
        "My old number was {}, I gave that up.",
        "My daughter gave me {} to call, but she's busy.",
    )
    _CHATTER = (
        "let me get my glasses",
        "the battery is at 41 percent, by the way",
        "my neighbor at number 12 has the same model",
        "sorry, the dog is barking",
        "this took me 3 minutes",
        "I have to be out by 5",
    )

    def __init__(self, chosen: str, rng: random.Random) -> None:
        super().__init__(chosen, rng)
        self.left = self.CHATTERS
        # One name a thing and episode: people do not change their words from sentence to sentence.
        self.names = [pair for pair in _OTHER_NAMES if rng.random() < 0.6]
        self.chatter = rng.sample(self._CHATTER, len(self._CHATTER))

    def opening(self, scenario: Any) -> str:
        """With a second phone number, of no customer: all of those begin with 555."""
        decoy = f"{self.rng.randint(201, 499)}-{self.rng.randint(201, 999)}-{self.rng.randint(1000, 9999)}"
        place = f" I'm {scenario.location}." if scenario.abroad else ""
        parts = [
            self.rng.choice(_COMPLAINTS[scenario.issue]),
            f"My name is {scenario.name} and my number is {scenario.phone}.{place}",
            self.rng.choice(self._DECOYS).format(decoy),
        ]
        return " ".join([self.rng.choice(self._HELLOS), *self.rng.sample(parts, len(parts))])

    def words(self, parts: list[str], only_checked: bool) -> list[str]:
        told = [_rewritten(part, self.names) for part in parts]
        if self.left and told and self.rng.random() < 0.6:
            self.left -= 1
            told.insert(self.rng.choice((0, len(told))), self.chatter.pop())
        return told


class Misreads(Mood):
    name = "misreads"
    _STATES = re.compile(
        r"(?P<what>(?:airplane mode|mobile data|roaming|Data Saver|VPN|Wi-Fi calling|SMS permission|storage permission"
        r"|network mode|MMSC) is) (?P<state>on|off|2G only|3G only|4G/5G|set|not set)\b"
    )

    def __init__(self, chosen: str, rng: random.Random) -> None:
        super().__init__(chosen, rng)
        self.left = 1
        self.wrong = ""  # "VPN is", after it was said wrongly

    def slip(self, facts: dict[str, str], requests: list, answer: Any) -> Batches:
        wanted = [r for r in requests if r.topic in _MIXED_UP and r.action != "check" and not r.condition]
        wanted = [r for r in wanted if facts.get(r.topic) != r.action]
        if not self.left or not wanted:
            return requests
        self.left, missed = 0, self.rng.choice(wanted)
        yield [("toggle_wifi", {}), ("toggle_wifi", {})]
        answer.say(f"I flipped Wi-Fi instead of {_NAMES[missed.topic]} and put it back")
        return [request for request in requests if request is not missed]

    def words(self, parts: list[str], only_checked: bool) -> list[str]:
        text = "\n".join(parts)
        found = list(self._STATES.finditer(text))
        if self.wrong and any(match["what"] == self.wrong for match in found):
            self.wrong = ""
            return [*parts, "I misread that before"]
        if not (self.left and found and only_checked):
            return parts
        self.left, match = 0, self.rng.choice(found)
        self.wrong = match["what"]
        said = f"{match['what']} {_OPPOSITE.get(match['state'], '4G/5G')}"
        return (text[: match.start()] + said + text[match.end() :]).split("\n")


class Eager(Mood):
    name = "eager"

    def __init__(self, chosen: str, rng: random.Random) -> None:
        super().__init__(chosen, rng)
        self.left = {"restart", "switch"}
        self.did = self.already = ""

    def plan(self, issue: str, requests: list) -> list:
        """One thing more than asked, after the changes and before the test; never the opposite of what was asked."""
        self.did = self.already = ""
        changes = [r for r in requests if r.action != "check" and r.topic != "payment"]
        asked = {r.topic for r in requests}
        free = [topic for topic in _SWITCHES[issue] if topic not in asked]
        can = [kind for kind in sorted(self.left) if (free if kind == "switch" else "restart" not in asked)]
        if not changes or not can:
            return requests
        kind = self.rng.choice(can)
        self.left.remove(kind)
        topic = self.rng.choice(free) if kind == "switch" else "restart"
        action = "on" if kind == "switch" else "do"
        extra = dataclasses.replace(changes[-1], topic=topic, action=action, text="", condition="")
        name = _NAMES.get(topic, "")
        self.did = f"I also turned {name} on" if kind == "switch" else "I also restarted the phone"
        self.already = f"{name.removeprefix('the ')} is already on"
        place = max(index for index, request in enumerate(requests) if request is changes[-1]) + 1
        return [*requests[:place], extra, *requests[place:]]

    def words(self, parts: list[str], only_checked: bool) -> list[str]:
        if not self.did or self.already in parts:
            return [part for part in parts if part != self.already]
        return [*parts, self.did]


class AsksBack(Mood):
    name = "asks_back"
    _QUESTIONS = ("Where do I find {}?", "Sorry, what do you mean by {}?", "Which one is {}, and where is it?")
    _EXPLAINS = re.compile(r"\b(settings|menu|tap|swipe|icon)\b")

    def __init__(self, chosen: str, rng: random.Random) -> None:
        super().__init__(chosen, rng)
        self.asked: set[str] = set()
        self.waiting: list = []  # requests, until the agent explains
        self.topic = ""

    def listen(self, text: str, topics: Sequence[str], requests: list) -> tuple[str, list]:
        if self.waiting:
            waiting, self.waiting = self.waiting, []
            if self._explained(text, topics, requests):
                return "", waiting + [r for r in requests if r.key not in {w.key for w in waiting}]
        kind = "change" if any(r.action != "check" for r in requests) else "check"
        known = [r.topic for r in requests if r.topic in _NAMES]
        if kind in self.asked or not known:
            return "", requests
        self.asked.add(kind)
        self.waiting, self.topic = requests, self.rng.choice(known)
        return self.rng.choice(self._QUESTIONS).format(_NAMES[self.topic]), []

    def _explained(self, text: str, topics: Sequence[str], requests: list) -> bool:
        """The agent names the thing again, or says where it is without asking for anything else."""
        path = bool(self._EXPLAINS.search(text.lower()))
        if requests:  # "open Settings, tap Mobile network, ..." sounds like a request about something else
            looks = self.topic in topics or all(r.action == "check" for r in requests)
            return self.topic in {r.topic for r in requests} or (path and looks)
        return self.topic in topics or path


_CLASSES = {mood.name: mood for mood in (Mood, Terse, Rambling, Misreads, Eager, AsksBack)}


def _rewritten(text: str, pairs: list[tuple[str, str]]) -> str:
    for pattern, words in pairs:
        text = re.sub(pattern, words, text)
    return text
