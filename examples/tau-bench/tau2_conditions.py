"""The "if" in what an agent asks of the scripted customer: which act hangs on it, and what it is about.

    split("turn off the vpn if it's on, then restart")    ("it's on", "turn off the vpn"), ("", "then restart")

A library, used by tau2_understanding.py and tau2_users.py. All text is in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tau2_topics import NAMES, TOGGLES, find_topics, state

NOT = "not so: "  # before a condition that is turned round
_WHETHER = re.compile(
    r"\b(check|checking|see|verify|confirm|tell me|know|ask|wondering|determine|find out|look|sure) if\b"
)
_NO_CONDITION = re.compile(r"\b(even|as|what) if\b[^,.?!]*")
VERB = (
    r"(?:turn|switch|toggl|flip|put|enabl|disabl|activat|deactivat|connect|disconnect|re-?seat|re-?insert|remov"
    r"|tak|re-?set|restart|reboot|set|chang|select|choos|grant|allow|giv|run|re-?run|try|send|pay|accept|approv)(?:e|ing)?\b"
)
_ACT = re.compile(rf"\b{VERB}|\b(?:check|tell|let|make sure|ensure)\b")
LED_BY = r"(?:(?:then|please|also|kindly|just|next|go ahead and) )*"
# Where the condition ends and the act begins: "if so, ...", "if it's on please ...", "if it's on turn ...".
_ACT_BEGINS = re.compile(
    rf",| (?=(?:please|then|kindly|otherwise)\b| ?(?:can|could|would|will) you\b)| and (?={LED_BY}{VERB})"
    rf"|\b(?:on|off|so|not|is|isn't|enabled|disabled|active|connected|missing|[2-5]g(?: only)?) (?!set\b)(?={VERB})"
)
_LAST_ACT = re.compile(rf"(?:,|\band|\bthen|\bbut) (?={LED_BY}{VERB})")
# What an "if" that comes before its act follows.
_JOINT = re.compile(r"(^|[,:]|\b(and|so|then|but|or|also|please|now|next))\s*$")
_SO = re.compile(r"(so|yes|(it|that|this)('s| is)( the case| so| true)?|(they|those) are)")
_NOT_SO = re.compile(
    r"(not|no|(it|that|this)( isn't|'s not| is not)|(they|those)( aren't|'re not| are not))( already)?( so)?"
)
_SEVERAL = re.compile(r"\b(they|they're|any|either|both|these|those)\b")
_PRONOUN = re.compile(r"\b(it|it's|they|they're|that|this|one|any|either|both|these|those)\b")

_FAILS = re.compile(
    r"\bstill\b|\bfail\w*\b|\bpersists?\b|\bcontinues\b|\bno luck\b|\bunresolved\b|\bunsuccessful\b"
    r"|(\bnot|n't|\bcannot|\bunable to)( \w+)?"
    r" (work|help|send|go|resolve|fix|improve|come|return|change|better|excellent)"
    r"|\bspeeds?\b.*\b(slow|poor|low|bad)\b"
)
_WORKS = re.compile(r"\b(works?|working|fixed|resolved|solved|restored|helps|helped|improves?|improved|excellent)\b")
_SETTINGS = ("apn", "mode", "permissions", "sim")


def split(sentence: str) -> list[tuple[str, str]]:
    """(condition or "", what is asked) for each part of a sentence, in its order."""
    sentence = re.sub(r"^otherwise\b,?", "if not,", sentence)
    sentence = _NO_CONDITION.sub(" ", _WHETHER.sub(r"\1 whether", sentence))
    first, *pieces = re.split(r"\b(if|unless)\b", sentence)
    found = [("", first)]
    for word, piece in zip(pieces[::2], pieces[1::2], strict=True):
        condition, act = _halves(piece)
        condition = opposite(condition) if word == "unless" else condition
        before, earlier = found[-1]
        if act and (_JOINT.search(earlier) or not _asks(earlier)):
            found.append((condition, act))
        elif "whether" in earlier and _JOINT.search(earlier):  # "check whether A and if B"
            found += [("", f"check whether {condition}"), ("", act)]
        elif before == "" and _asks(earlier):
            rest, last = _cut_before_last_act(earlier)
            found[-1:] = [("", rest), (spelled_out(condition, "", [find_topics(last)]), last), ("", act)]
    found = [part for pair in found for part in _with_otherwise(*pair)]
    end = "?" if sentence.endswith("?") else ""
    return [(condition, act.strip(" ,?") + end) for condition, act in found if act.strip(" ,.?!")]


def _halves(piece: str) -> tuple[str, str]:
    """("it is on", "please turn it off") of "it is on please turn it off"."""
    begins = _ACT_BEGINS.search(piece.lstrip(" ,"))
    if not begins:
        return piece.strip(" ,.?!"), ""
    piece = piece.lstrip(" ,")
    return piece[: begins.end()].removesuffix("and ").strip(" ,"), piece[begins.end() :].strip()


def _asks(text: str) -> bool:
    return bool(_ACT.search(text) or find_topics(text))


def _cut_before_last_act(text: str) -> tuple[str, str]:
    """ "restart and turn roaming on" -> "restart", "turn roaming on": a condition behind both is on the second."""
    ends = [match.end() for match in _LAST_ACT.finditer(text)]
    return (text[: ends[-1]].removesuffix("and "), text[ends[-1] :]) if ends else ("", text)


def _with_otherwise(condition: str, act: str) -> list[tuple[str, str]]:
    if not condition or "otherwise" not in act:
        return [(condition, act)]
    act, _, other = act.partition("otherwise")
    return [(condition, act), (opposite(condition), other)]


def opposite(condition: str) -> str:
    return condition.removeprefix(NOT) if condition.startswith(NOT) else NOT + condition


def spelled_out(condition: str, asked: str, named: Sequence[Sequence[str]]) -> str:
    """The condition without words for what was said before: "if so" means `asked`, "it" a topic of those `named`."""
    if condition.startswith(NOT):
        return opposite(spelled_out(opposite(condition), asked, named))
    short = condition.strip(" .")
    if asked and _SO.fullmatch(short):
        return asked if find_topics(asked) else spelled_out(asked, "", named)
    if asked and _NOT_SO.fullmatch(short):
        return opposite(asked if find_topics(asked) else spelled_out(asked, "", named))
    fitting = (*TOGGLES, "permissions") if state(short) else tuple(NAMES)
    topics = next(filter(None, [[t for t in topics if t in fitting] for topics in named]), [])
    if not topics or not _PRONOUN.search(short) or find_topics(short):
        return condition
    return name_it(short, topics)


def name_it(condition: str, topics: Sequence[str]) -> str:
    """The condition with what it is about: "they" are all of the topics, "it" is the first."""
    if condition.startswith(NOT):
        return opposite(name_it(opposite(condition), topics))
    names = [NAMES[topic] for topic in topics]
    return f"{' or '.join(names) if _SEVERAL.search(condition) else names[0]}: {condition}"


def is_outcome(condition: str) -> bool:
    """Whether a condition is about what came of it ("if it still doesn't work"), and not about a setting."""
    topics = find_topics(condition)
    if any(topic in _SETTINGS for topic in topics) or (state(condition) and any(t in TOGGLES for t in topics)):
        return False
    return bool(_FAILS.search(condition) or _WORKS.search(condition))


def is_failure(condition: str) -> bool:
    """Whether an outcome's condition speaks of failure."""
    return bool(_FAILS.search(condition)) or not _WORKS.search(condition)


def parts(condition: str) -> tuple[bool, list[str]]:
    """(whether all parts are needed, the parts): "A is on or B is on" holds when one does."""
    pieces = re.split(r"\band\b|\bor\b|,", condition)
    joined: list[str] = []
    for piece in pieces:  # "2g or 3g" is one part, and so is "it is not set and 2g"
        if joined and (not find_topics(piece) or find_topics(piece) == find_topics(joined[-1])):
            joined[-1] += f" or {piece}"
        else:
            joined.append(piece)
    return " or " not in condition, joined
