"""What the agent asks of the scripted customer: ordinary wordings of an instruction, read as requests.

    parse("Please turn off airplane mode, then restart your phone.")   airplane off, restart

A library, used by tau2_users.py. It sees one message of the agent, nothing of the task or the phone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_HEARD = 10_000  # characters of one message; some wordings below take time with its square
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
TOGGLES = ("airplane", "data", "roaming", "saver", "vpn", "wifi", "wifi_calling")

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
    for sentence in _sentences(_spoken(text)[:LONGEST_HEARD]):
        condition, act = _split_condition(sentence)
        if condition:
            recent = find_topics(condition) or recent
        requests, recent = _parse_sentence(act, recent)
        for request in requests:
            request.condition = condition
            if all(request.key != other.key or request.text != other.text for other in found):
                found.append(request)
    return _merged(found)


def _spoken(text: str) -> str:
    """The text without what nobody says on the phone: tags, JSON and names of functions are no instructions."""
    text = re.sub(r"<tool_call>.*?(</tool_call>|$)|<[^<>]*>", " ", text, flags=re.DOTALL)
    text = _without_braces(text)
    return re.sub(r"\b(?![2-5]g_)\w*[^\W_]_\w*", " ", text, flags=re.IGNORECASE)


def _without_braces(text: str) -> str:
    """A space for each {...}, with what is nested in it; the text ends at a brace that is never closed."""
    kept, depth = [], 0
    for piece in re.split(r"([{}])", text):
        if piece == "{":
            depth += 1
        elif piece == "}" and depth:
            depth -= 1
            if depth == 0:
                kept.append(" ")
        elif depth == 0:
            kept.append(piece)
    return "".join(kept)


def _sentences(text: str) -> list[str]:
    text = re.sub(r"[’`]", "'", text.lower())
    # First, so that the next pattern looks at a run of newlines once and not from each of them.
    text = re.sub(r"\n\s*", "\n", "\n" + text)
    text = re.sub(r"\n(\d+[.)]|[-*•])\s*", ", ", text)
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
    if _verb(before) or find_topics(before):
        return after.strip(" .?"), before.strip()
    condition, comma, act = after.partition(",")
    if not comma:
        condition, _, act = after.partition(" then ") if " then " in after else after.partition(" please ")
    return condition.strip(), act.strip()


def _parse_sentence(sentence: str, recent: Sequence[str]) -> tuple[list[Request], Sequence[str]]:
    requests: list[Request] = []
    clauses = re.split(r",|:|\band\b|\bthen\b|\balso\b|\bplus\b|&|\bor\b|\bafterwards\b", sentence)
    directions = [_direction(clause) for clause in clauses]
    verb = "check" if sentence.endswith("?") else ""
    mentioned: list[str] = []
    wants_state = False  # "make sure that A is off, B is on and C is 5G": each is a wish of its own
    for index, clause in enumerate(clauses):
        topics = find_topics(clause)
        wants_state = wants_state or bool(_WANTS_STATE.search(clause))
        if _NEVER.search(clause) or (_FIRST_PERSON.search(clause.strip()) and not _TO_YOU.search(clause)):
            mentioned += topics
            verb = ""
            continue
        own = _verb(clause)
        if not own and wants_state and _IS_IT.search(clause):
            own = directions[index] or "set"
        if own in ("on", "off") and sentence.endswith("?") and _IS_IT.search(clause):
            own = "check"
        if own == "turn":
            own = next(filter(None, directions[index:]), "on")
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
def find_topics(text: str) -> tuple[str, ...]:
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
    if topic in TOGGLES:
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


def is_outcome(condition: str) -> bool:
    """Whether a condition is about what came of it ("if it still doesn't work"), and not about a setting."""
    return bool(
        re.search(r"\b(still|doesn't|does not|not work\w*|fails?|persists?|no luck|didn't|unresolved)\b", condition)
    )
