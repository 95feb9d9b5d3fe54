"""What an agent can speak of with the scripted customer, and the state in which a wording puts it.

    find_topics("turn off the VPN and Wi-Fi")   ("vpn", "wifi")
    state("the vpn is not connected")           "off"

A library, used by tau2_understanding.py, tau2_conditions.py and tau2_users.py.
"""

from __future__ import annotations

import functools
import re

# Topic -> wording. Where two match at one place the earlier in this list wins.
_TOPICS = {
    "identity": r"\b(full name|your name|phone number|date of birth|customer id|who am i speaking)\b",
    "payment": r"\bpayment requests?\b|\bpay(ment|ments|ing)?\b|\bpaid\b|\bbills?\b|\brequest (for|of) (?=\$)",
    "refuel": (
        r"\brefuel\w*( (your|the) data)?|\btop[- ]?up\b"
        r"|\b(add|adding|buy|purchase)\b[^?!]*\b(gb|data)\b|\b(more|extra|additional) data\b"
        r"|\bhow (much|many) (more )?(data|gb|gigabytes)\b[^.?!]*\b(add|buy|purchase|like|need|want)\b"
        r"|(\$[\d.]+|\bdollars?) (per|a) (gb|gigabyte)\b|\b[\d.]+ ?gb for \$"
    ),
    "handover": r"\b(transfer|connect|hand|pass|escalat)\w* (you |this |your case )?(over |on )?"
    r"(to|with) (a|an|our|another|the) [^.?!]*\b(agent|team|specialist|representative|colleague|human|department)\b",
    "note": r"\banything else (that )?(you('d| would)? (like|want|need)( me| us)? to|i should)"
    r" (note|add|mention|share|include|tell|say|pass|know)\b",
    "plan": r"\b(change|changing|switch|switching|upgrade|upgrading|another|different|new|higher)\b[^.,?!]*\bplans?\b",
    "airplane": r"\b(air ?plane|aeroplane|flight)[- ]?mode\b|\bair ?plane icon\b",
    "wifi_calling": r"\bwi-?fi[- ]calling\b",
    "wifi": r"\bwi-?fi\b",
    "roaming": r"\b(mobile |cellular )?(data )?roaming\b",
    "saver": r"\bdata[- ]?sav(er|ing)( mode)?\b|\bdata restrictions?\b|\blow data mode\b",
    "vpn": r"\bvpns?\b|\bvirtual private network\b",
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
    "speed": r"\bspeed ?-?tests?\b|\binternet speed\b|\btest (your|the) (\w+ )?(speed|connection)\b|\bhow fast\b"
    r"|\b(re-?test|check|measure) (your|the) (\w+ )?speed\b"
    r"|\bhow('s| is) (the|your) (\w+ )?(speed|connection|internet)\b",
    "mms": (
        r"\bmms\b|\b(picture|multimedia|photo|group) messag\w+"
        r"|\bsend(ing)?( me)? (a |an |the |your |that )?(test )?(picture|photo|image)\b"
    ),
    "restart": r"\b(restart|reboot|power[- ]?cycle)\w*",
    "sim": r"\bsim\b( card)?",
    "status_bar": (
        r"\bstatus bar\b|\btop of (your|the) (phone's )?screen\b"
        r"|\bsignal\b|\bbars\b|\b(have|has|get|getting|any|no|is|see|your|phone|cell) service\b"
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
        r"|\b(issue|problem)\b[^.!]*\b(fixed|resolved|solved|persists?)\b"
        r"|\b(fixed|resolved|solved) (the|your) (issue|problem)\b|\banything else\b"
        r"|\bshould (now )?(be |have )?(work\w*|restored|fixed|back|fine)\b"
        r"|\b(run|do|try|perform) (another|one more|a new) test\b|\btry (once more|one more time)\b|\bretry\W*$"
        r"|\b(re-?)?run (it|that|the test)\b|\btry (to send|sending) (it |one |that )?(again|once more)\b"
        r"|\b(test|try) (it )?again\b|\bdid (that|it) (help|work)\b|\b(is|does) (it|that|everything) work(ing)?\b"
    ),
}
TOPIC_PATTERNS = {topic: re.compile(pattern) for topic, pattern in _TOPICS.items()}
SWITCHES = {  # the phone's, as the customer calls them
    "airplane": "airplane mode",
    "data": "mobile data",
    "roaming": "roaming",
    "saver": "Data Saver",
    "vpn": "VPN",
    "wifi": "Wi-Fi",
    "wifi_calling": "Wi-Fi calling",
}
TOGGLES = tuple(SWITCHES)

OFFERS = ("refuel", "plan", "payment", "handover")  # the agent asks first
# A wording of each topic that "it" can stand for.
NAMES = {topic: name.lower() for topic, name in SWITCHES.items()} | {
    "mode": "network mode",
    "apn": "apn",
    "permissions": "permissions",
    "sim": "sim card",
    "status_bar": "signal",
}
# What each verb can be done to; the other verbs fit everything.
_FITS = {
    "on": (*TOGGLES, "permissions"),
    "off": TOGGLES,
    "turn": TOGGLES,
    "reseat": ("sim",),
    "grant": ("permissions",),
    "approve": ("payment", "permissions"),
    "pay": ("payment",),
    "reset": ("apn", "mode"),
    "set": ("mode",),
    "restart": (),
}

_SMALL_WORDS = re.compile(
    r"(\b(on|off|the|your|both|back|again|now|please|also|too|mode|switch|settings?|status)\b|\W)*"
)
_STATE = re.compile(
    r"\b((?P<on>on|enabled|active|activated|connected|allowed|granted)"
    r"|(?P<off>off|disabled|inactive|deactivated|disconnected|denied))\b"
)
_IN_USE = re.compile(
    r"\busing\b|\bin (air ?plane|aeroplane|flight|low data)[- ]?mode\b"
    r"|\bthere('s| is| isn't)( not)? (an?|no|any)\b|\b(have|has) (an?|no|the|both|storage|sms|permission)\b"
)
_NEGATED = re.compile(r"\b(not|no|never|none|nor|neither|without|\w+n't)\b")
# "on" that says where, and not that something is switched on.
_ON_SOMETHING = re.compile(
    r"\b(based|depend\w*|hold\w*|later|early|focus\w*|rely|click\w*|tap\w*|press\w*|impact|effect) on\b"
    r"|\bon (?=(your|the|my|our|this|that|its|top)\b)"
)


@functools.lru_cache(maxsize=1024)  # agents repeat themselves
def find_topics(text: str) -> tuple[str, ...]:
    """Topics in the order in which the text names them; a place belongs to one topic only."""
    places: list[tuple[int, int, str]] = []
    for topic, pattern in TOPIC_PATTERNS.items():
        for match in pattern.finditer(text):
            if all(match.end() <= start or match.start() >= end for start, end, _ in places):
                places.append((match.start(), match.end(), topic))
    return tuple(dict.fromkeys(topic for _, _, topic in sorted(places)))


def without_topics(text: str) -> str:
    for pattern in TOPIC_PATTERNS.values():
        text = pattern.sub(" ", text)
    return text


def only_names(clause: str) -> bool:
    """Whether a clause says no more than "airplane mode off"."""
    return bool(find_topics(clause) and _SMALL_WORDS.fullmatch(without_topics(clause)))


def fits(topic: str, verb: str) -> bool:
    """Whether a verb can be meant of this topic: nobody turns a payment off."""
    return topic in _FITS.get(verb, (topic,))


def without_places(text: str) -> str:
    """The text without an "on" of "on your phone" and the like."""
    return _ON_SOMETHING.sub(" ", text)


def state(text: str) -> str:
    """The state that a clause speaks of: "on", "off" or ""; "not connected" is off."""
    text = without_places(text)
    said = _STATE.search(text)
    if not said and not _IN_USE.search(text):
        return ""
    negated = bool(_NEGATED.search(text[: said.start()] if said else text))
    off = bool(said and said["off"])
    return "off" if off != negated else "on"
