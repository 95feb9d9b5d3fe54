"""What the agent asks of the scripted customer: ordinary wordings of an instruction, read as requests.

    parse("Please turn off airplane mode, then restart your phone.")   airplane off, restart

Who is unsure looks and answers: only what is clearly asked for changes the phone. A library, used by tau2_users.py. It
sees one message of the agent, nothing of the task or the phone. Topics are in tau2_topics.py, "if" in
tau2_conditions.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from tau2_conditions import name_it, spelled_out, split
from tau2_sections import NEW_ACT, plain, sections
from tau2_topics import OFFERS, TOGGLES, TOPIC_PATTERNS, find_topics, fits, only_names, state, without_places

LONGEST_HEARD = 10_000  # characters of one message; some wordings below take time with its square
REMEMBERED = 3  # sentences back, for what "it" stands for
FARTHEST = 12  # clauses from a verb to the end of its list

# Wordings that span several clauses, brought to one phrase before the text is cut into clauses.
_PHONE = r"(your |the )?(phone|device|handset|it)"
_BACK_ON = r",?( and| then)+( turn| switch| power)?( it)?( back)? on( again)?"
_BACK_IN = r"(re-?insert\w*|(put|pop|plac|insert)\w*( it)?( back| again)?( in\b)?( again)?)"
_PHRASES = [
    (rf"\b(turn|switch|power)(ing)? {_PHONE}( completely)? off{_BACK_ON}", "restart"),
    (rf"\b(turn|switch|power)(ing)? off {_PHONE}{_BACK_ON}", "restart"),
    (
        rf"\b(remov\w+|(take|taking|pull|pop)\w* out|eject\w*) (your |the )?sim( card)?[^.;]*?\b{_BACK_IN}",
        "reseat sim",
    ),
    (rf"\b(take|taking|pull\w*|pop\w*) (your |the )?sim( card)? out[^.;]*?\b{_BACK_IN}", "reseat sim"),
    (r" - (?=(it|this|that|these|they|so|then|if|please|make sure)\b)", ". "),
    (
        r"\b(let me know|tell me) (if|whether) you('d| would) (like|want|be willing|wish) to"
        r" (?=(accept|pay|approve)\b)",
        "please ",
    ),
    (r"\bit (might|may|could|can|would|should) (also )?help (to|if you)\b", "please"),
    (r"\balso (?=(needs?|has|have|must|should|is|are|be)\b)", ""),
    (r"\b(should|must|to) also be\b", r"\1 be"),
    (r"\bget (it|that|this|them) (turned |switched )?(?=(on|off|enabled|disabled)\b)", r"make sure \1 is "),
    (
        r"\b(air ?plane|flight) mode on (for [^,.;?!]*)?,?( and)? then( back)? off( again)?\b",
        r"\1 mode on, turn it off",
    ),
    (r" - (?=(shall|should|may|would|is that) (i|we|you|okay|ok)\b)", ". "),
    (rf" ?→ ?(?={NEW_ACT.pattern})", ", then "),
    (r"\bfor [^.,;?!]{1,60}? to (work|function)\b", " "),
    # What the agent announces is for later.
    (r"\b(you('ll| will) then (need|have)|and (then )?ask you) to [^.?!;]*", " "),
    (r"\boff,?( and| then)+( back)? on\b( again)?", "off, turn it on"),
    (r"\bon,?( and| then)+( back)? off\b( again)?", "on, turn it off"),
    (
        r"\b(i'd|i would|we'd|we would) (really )?appreciate it if you (could|would)\b"
        r"|\bit would (be \w+|help) if you (could|would)\b|\bwondering if you (could|would)\b",
        "please",
    ),
    (
        r"\b(is|would) (it|that) (be )?(ok|okay|alright|all right|fine)( with you)? if (i|we)\b|\bdo you mind if i\b"
        r"|\bdo i have your (permission|consent|approval|authori[sz]ation) to\b",
        "may i",
    ),
    (r"\b(don't|do not|never) forget to\b|\bwhy don't (you|we)\b", "please"),
    # "Once you have turned it off, ..." asks to turn it off.
    (
        r"\b(once|after|when|as soon as) you('ve| have)( already| successfully)?"
        r" (turn|switch|restart|reboot|reset|disable|enable|toggle|activate|deactivate|disconnect|connect)(ed|d)?\b",
        r"\1 you \4",
    ),
    # "Before" puts the second thing first; what is before something that the agent does is not asked for.
    (r"\bbefore (we|i)\b[^,.?!;:]*", " "),
    (r"(^|[.?!;] )before ((you )?[^,.?!;]+), ([^.?!;]+)", r"\1\4, then \2"),
    (r"\bbefore (?=you \w+|\w+ing\b)", ", then "),
]
_LINE = re.compile(r"([.;]?)\n(\d+[.)]|[-•*#]+)?\s*")
_LEAD = r"^(so|but|and|now|first|okay|ok|next|then|finally|great|alright|also|here|please|well|\s)*\b"
_ASKS_WHETHER = re.compile(
    r"\b(check|see|verify|confirm|tell me|know|ask|wondering|determine|find out|show me|share|provide)"
    r" (if|whether|that|what|which|how|where)\b|\bwhether\b|\bdouble[- ]check\b"
)
_QUESTION = re.compile(
    _LEAD + r"(is|are|isn't|aren't|am|do|does|did|don't|have|has|had|was|were|what|what's|which|who|when|where|why"
    r"|how)\b(?! (about|don't you|not)\b)"
    r"(?! you (want|wish|agree|accept|approve|mind|authori[sz]e|consent|willing|happy|okay|ok)\b)"
)
_POLITE = re.compile(r"\b(please|(can|could|would|will|should) (you|we)|shall we|let's|kindly|do you mind)\b")
_WANTS_STATE = re.compile(
    r"\b(make sure|making sure|ensure|ensuring|should (not |now |both |all |always )?be|shouldn't be|must (not )?be"
    r"|needs? to be"
    r"(?! (fixed|corrected|resolved|changed|addressed|adjusted|sorted|updated|looked)\b)"
    r"|(has|have) to be|be set|keep|leave)\b"
)
_CORRECT = re.compile(
    r"\b(correct|fix|change|adjust|set|toggle) (whichever|any|anything|whatever|those|them|the ones?)\b[^.?!]*"
    r"\b(isn't|aren't|is not|are not|is wrong|are wrong|not (right|correct))\b"
)
_SHOULD = re.compile(r"\b(should|must|needs?|ha(s|ve) to)\b.*\bbe\b")
_SO_SHOULD = re.compile(r"\bso (should|must)\b|^\s*(should|must)\b")
_IS_IT = re.compile(r"\b(is|are|was|were|isn't|aren't|be|been|do you have|does|(you|they)'re)\b")
_NEVER = re.compile(
    r"\b(don't|do not|(should|must|can)(n't| not)|can't|cannot|never|not to|no need to|need not|needn't|avoid)\b"
)
_FIRST_PERSON = re.compile(
    _LEAD + r"(i|we|i'm|i've|i'll|i'd|we've|we'll|we'd|we're|let me (?!know)|allow me|thanks?|thank you)\b"
)
# A first person that will do something: "I'll look and turn roaming on" is one sentence about the agent.
_WILL = re.compile(r"\b(i|we)('ll| will| can| could| am| are| need| want|'m|'re|'d)\b|\blet me\b|\ballow me\b")
_TO_YOU = re.compile(
    r"\b(you to|please|can we|could we|shall we)\b|\?|\b(may|can|could) i (have|get|ask|know)\b"
    r"|\bwe('ll| will)?( also| now| just| first)? (need to|have to|want to|should|must|can try|could try)\b"
    r"|\b(i|we)('d| would)?( also| strongly| highly)* (suggest|recommend|advise|propose|ask)\b"
    r"|\b(i|we)('ll| will)?( also)? need your\b"
    r"|\bi('d| would)?( also| just)? (like|want|need|love) to (know|hear|confirm|verify|double-check)"
    r" (if|whether|what|that)\b"
)
# What waits until the agent has done something.
_LATER = re.compile(r"\b(once|after|when|as soon as) (i|we)('ve|'ll)?\b")
_OUR_SIDE = re.compile(
    r"\b(on|for|to) your (line|account)\b|\b(on|from) (my|our) (end|side)\b|\bin (the|our) system\b"
)
_ASIDES = re.compile(
    r"\b(while|until|as|because|so that|so|after) (i|we)\b.*|\bwithout\b.*|\b(instead of|rather than)\b.*"
)
_PASSIVE = re.compile(
    r"\b(has|have) (now |already |just )?been\b"
    r"|\b(is|are|was|were) (now |already )?(reset|granted|restored|paid|approved)\b"
)
_RESULT = re.compile(
    r"\b(test|result|status bar|screen|phone|report|mms) (still )?"
    r"(shows|showed|says|said|indicates|failed|came back)\b"
)
_ONCE = re.compile(r"\b(once|when|after|as soon as)\b")
_SUBJECT = re.compile(
    r"\b(can|may|might|could|will|would|does)\b(?!'t| you\b| we\b)"
    r"|\b(lets|allows|enables|helps|makes|means|requires|restricts)\b"
)  # "a VPN can turn ... off"
_IT = re.compile(_LEAD + r"((since|because|as) )?(it|this|that|they|these|those|which) ")
_GERUND = re.compile(
    _LEAD + r"(turn|switch|disabl|enabl|disconnect|connect|restart|reboot|resett|re-?seat|remov|grant|chang|toggl"
    r"|deactivat|activat|sett|putt|keep|leav)ing\b"
)

_RESEAT = re.compile(
    r"\bre-?seat\w*|\bre-?insert\w*|\bremov(e|ing)\b|\b(take|taking)( it)? out\b(?! of (air|flight))"
    r"|\bput\b.*\bback\b|\beject\w*|\bre-?install\w*"
)
_GRANT = re.compile(r"\b(grant|allow|give|add)\w*")
_RESET = re.compile(r"\b(re-?set|restore)\w*|\bto default\b")
_PAY = re.compile(
    r"\bpay(ing)?\b|\b(make|making|complet\w*|submit\w*|process\w*|proceed\w* with|go ahead with|settle)\b"
    r".*\bpayment\b"
    r"|\bmake it\b|\b(once|when|after|as soon as)\b.*\b(paid|(made|completed) (the|your) payment"
    r"|payment (is|has been) (made|complete\w*))\b"
)
_APPROVE = re.compile(r"\b(accept|approv|authori[sz])\w*")
_IS_DONE_TO = re.compile(
    r"\b(granted|allowed|given|added)\b"
    r"|\b(is|are|was|were|be|been|isn't|aren't|has|have)( (now|both|all|not|already|also|either|\w+ly))*"
    r" (reset|restored|accepted|approved)\b"
)
_RESTART_HELPS = re.compile(r"\b(restart|reboot)\w*\b.*\b(help|fix|solve|resolve|work)")
_OFF = re.compile(
    r"\b(disabl|deactivat)(e|ing)\b|\bdisconnect(ing)?\b|\b(exit|quit)(ing|ting)?\b|\bstop using\b"
    r"|\bout of (air|flight)"
)
_ON = re.compile(r"\b(re-?)?(enabl|activat)(e|ing)\b|\b(re-?)?connect(ing)?\b|\bput\b.*\b(in|into) (air|flight)")
_TURN = re.compile(r"\b(turn|switch|toggl|flip|put)(e|ing|ting)?\b")
_TURN_WAY = re.compile(
    r"\b(turn|switch|toggle|flip|put|power|leave|keep)\w*( it| them| that| this)?( back)? (on|off)\b"
)
_WAY = re.compile(r"\b(on|off)\b")
_NAMED_PERMISSION = re.compile(r"\bstorage\b|\bsms\b")
_NAMED_MODE = re.compile(r"\b[2-5]g\b|\blte\b")
_SET = re.compile(
    r"(?<!is )(?<!are )(?<!not )(?<!n't )(?<!be )(?<!been )(?<!'s )(?<!currently )(?<!already )"
    r"\b(set|chang(e|ing)|select(ing)?|choos(e|ing)|us(e|ing)|put|swap|updat(e|ing)|mov(e|ing)"
    r"|setting (?=(your|the|it)\b))\b"
)
_CHECK = re.compile(
    r"\b(check|look|see|tell|show|verify|confirm|view|review|report|read|(re-?)?test|measure"
    r"|re-?check|run|re-?run|try|retry|send|let me know"
    r"|need your|checking|running|trying|testing|sending|rerunning|verifying)\b"
)
_PRONOUN = re.compile(
    r"\b(it|its|that|this|them|those|both|these|any|all|each|either|yours|whichever|the (switch|toggle|slider|feature)"
    r"|(missing|other) ones?)\b"
)
_PLURAL = re.compile(r"\b(them|those|both|these|any|all|each|either|whichever|ones)\b")
# An act whose object is what was named before: "go to Settings > VPN and disconnect".
_BARE_ACT = re.compile(
    _LEAD + r"(simply |just |tap |select |choose |press )*((turn|switch|toggle) (on|off)|disconnect|enable|disable"
    r"|accept|approve|re-?set( to default)?)( now| please)?\W*$"
)
_DO_SO = re.compile(r"\bdo (so|that|this)\b")
_BARE_CHECK = re.compile(r"\b(check|look|verify|confirm)( (again|now|please|for me))?\W*$")
_IS_DONE = re.compile(r"\b(done|finished|completed?|ready)\b")

_VERBS = (
    ("reseat", _RESEAT),
    ("pay", _PAY),
    ("approve", _APPROVE),
    ("grant", _GRANT),
    ("reset", _RESET),
    ("restart", TOPIC_PATTERNS["restart"]),
    ("off", _OFF),
    ("on", _ON),
)
_DONE_TO = {
    "sim": ("reseat",),
    "apn": ("reset",),
    "permissions": ("grant", "on", "set", "approve"),
    "mode": ("set", "turn", "reset"),
    "payment": ("pay", "approve"),
}
_TESTS = (("speed", "check"), ("mms", "check"), ("status_bar", "check"), ("network", "check"), ("resolved", "check"))

_OFFERS_ITSELF = re.compile(
    _LEAD + r"((shall|should|may|can|could) i\b(?! (have|get|ask|know|see|check|confirm|verify))|may we\b)"
    r"|\b(like|want|authori[sz]e|okay for|ok for|fine for) me to\b"
)
_MAY_BE_HAD = re.compile(rf"{_FIRST_PERSON.pattern}|\byou (can|could|may|might)\b")
_MAY = re.compile(r"\b(can|could|able to|happy to)\b(?!'t)")
_CONSENT = re.compile(
    r"\b(shall|should|may) (i|we)\b|\b(like|want|authori[sz]e) me to\b|\b(would|do) you (like|want|prefer|wish)\b"
    r"|\bdo you (confirm|agree|accept|consent|approve|authori[sz]e)\b"
    r"|^(are you )?ready\b|\bcan you confirm\b(?! (the|these|whether|what)\b)|\bare you (ok|okay|happy|willing)\b"
    r"|\b(is|would|does) (that|this|it) (be )?(ok|okay|alright|all right|fine|acceptable|sound)\b"
    r"|\bcan i (proceed|go ahead)\b"
    r"|\bplease confirm (to|so|if you|whether you|that you|your (consent|approval))\b"
    r"|\bhow would you like to proceed\b|\bwould [^?]* be (ok|okay|alright|all right|fine|acceptable)\b"
)
_AGREED = re.compile(
    _LEAD + r"((is|does) (that|this|it) (be )?(correct|right|work)\b.*|correct|right|deal|okay|ok|alright)\?$"
)
_NEGATED_TRANSFER = r"(?<!not )(?<!n't )(?<!never )(?<!avoid )(?<!without )(?<!before )(?<!of )(?<!than )"
TRANSFERRED = re.compile(
    rf"{_NEGATED_TRANSFER}(being transferred|have been transferred|(am|are|i'm|we're) transferring you"
    r"|transferring you (now )?to)"
)


@dataclass
class Request:
    """One thing asked of the customer: a topic, what to do with it, and a condition.

    What to do is "check", "on", "off", "do", or "agree" to pay later. Topic "consent": a yes to what was offered.
    """

    topic: str
    action: str
    text: str = ""
    condition: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.topic, self.action


@dataclass
class _Mention:
    """A topic that "it" may stand for, with what was said of it."""

    topic: str
    state: str
    text: str


@dataclass
class _Heard:
    """What the sentences so far have left behind for the next."""

    recent: list[list[_Mention]] = field(default_factory=list)  # of each sentence, the last one's first
    said: list[_Mention] = field(default_factory=list)  # by the customer, before this message
    offered: tuple[str, ...] = ()
    asked: str = ""  # the last question, which "if so" takes up
    condition: str = ""  # of the act that is read now
    verb: str = ""  # "check" in a list of things to check
    acts: list[Request] = field(default_factory=list)  # spoken of last, which "do so" takes up
    heading: list[_Mention] = field(default_factory=list)  # of the section: what "it" is before anything else

    def mention(self, mentions: list[_Mention]) -> None:
        if mentions:
            self.recent = [mentions, *self.recent[:REMEMBERED]]

    def named(self) -> list[list[str]]:
        """Topics that "it" may stand for in a condition, the likeliest first."""
        return [[m.topic for m in mentions] for mentions in (self.heading, *self.recent, self.said)]


def parse(text: str, said: Sequence[str] = ()) -> list[Request]:
    """The requests in an agent's message, in its order. Text that asks for nothing gives an empty list.

    said: the customer's last statements, which "it" may stand for where the message itself names nothing.
    """
    return [replace(request) for request in _parse(_spoken(text)[:LONGEST_HEARD], tuple(said))]


@lru_cache(maxsize=1024)  # an agent says the same in many episodes
def _parse(text: str, said: tuple[str, ...]) -> tuple[Request, ...]:
    found: list[Request] = []
    verb = ""
    heard, listed = _Heard(said=_said(said)), []
    for section in sections(text):
        if heading := _mentions(section.heading, section.heading):
            inside = _Heard(heading=heading, offered=heard.offered)
            found += _read_section(section.text, inside)
            heard.offered, heard.asked = inside.offered, ""
            listed += [*heading, *(mention for group in reversed(inside.recent) for mention in group)]
        else:
            heard.mention(listed)
            heard.verb = verb if listed and section.text.startswith("\n- ") else ""
            listed = []
            found += _read_section(section.text, heard)
            verb = heard.verb  # which a list of things takes up
    return tuple(_merged(found))


def _said(parts: Sequence[str]) -> list[_Mention]:
    return [m for part in parts for clause in part.lower().split(", ") for m in _mentions(clause, clause)]


def _read_section(text: str, heard: _Heard) -> list[Request]:
    found: list[Request] = []
    for index, sentence in enumerate(_sentences(text)):
        heard.verb = heard.verb if index == 0 else ""
        if _CORRECT.search(sentence):
            found += [Request(m.topic, m.state) for m in _stated(heard)]
        for condition, act in split(sentence):
            condition = _hear_condition(condition, heard)
            requests = _parse_act(act, heard)
            if not requests:  # "if your SIM card is locked, let me know": the answer is said either way
                requests, condition = _told(condition, act), ""
            for request in requests:
                request.condition = _about(request.topic, condition)
            found += requests
    return found


def _stated(heard: _Heard) -> list[_Mention]:
    """The switches that were asked for in a state: "is A off and is B on? Please correct whichever isn't right"."""
    return [m for m in (heard.recent[0] if heard.recent else []) if m.topic in TOGGLES and m.state]


def _about(topic: str, condition: str) -> str:
    """The condition of what is done to a switch; one that names nothing ("it's on") is about that switch."""
    bare = topic in TOGGLES and state(condition) and not find_topics(condition)
    return name_it(condition, [topic]) if bare else condition


def _told(condition: str, act: str) -> list[Request]:
    """What is looked at for an act that is nothing but telling whether the condition holds."""
    if not re.search(r"\b(let me know|tell me)\b", act):
        return []
    return [Request(topic, "check", condition) for topic in find_topics(condition)]


def _hear_condition(condition: str, heard: _Heard) -> str:
    if condition:
        condition = spelled_out(condition, heard.asked, heard.named())
        heard.mention(_mentions(condition, condition))
        heard.asked = condition
    heard.condition = condition
    return condition


def _share_state(mentions: list[_Mention]) -> None:
    """ "A and B are off" is said of A too."""
    for mention, following in zip(mentions[-2::-1], mentions[:0:-1], strict=True):
        mention.state = mention.state or following.state


def _mentions(clause: str, of: str) -> list[_Mention]:
    return [_Mention(topic, state(of), clause) for topic in find_topics(clause)]


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
    text = plain(text)
    # Whitespace first, so that the next pattern looks at a run of newlines once and not from each of them.
    text = re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", "\n" + text))
    text = _LINE.sub(_line_end, text)
    text = re.sub(r"[()*]", " , ", re.sub(r"[\"“”]", " ", text))
    text = re.sub(r"\s+", " ", text.replace("—", ", ")).strip(" ,.")
    for pattern, phrase in _PHRASES:
        text = re.sub(pattern, phrase, text)
    sentences = re.findall(r"[^.!?;]*(?:\.(?=\S)[^.!?;]*)*[.!?;]?", text)
    return [sentence.strip(" ,") for sentence in sentences if sentence.strip(" ,.!;")]


def _line_end(match: re.Match) -> str:
    """What a new line is read as: the end of a sentence before an act, else a comma in a list of things."""
    acts = NEW_ACT.match(match.string, match.end())
    return ". " if acts or (match[1] and not match[2]) else ", "


# -- one part of a sentence -------------------------------------------------------------------------------------------


def _parse_act(act: str, heard: _Heard) -> list[Request]:
    topics = find_topics(act)
    offered = tuple(topic for topic in topics if topic in OFFERS)
    answers = _offers_something(act, topics, offered, bool(heard.offered))
    requests = [] if answers else _Reader(act, heard).read()
    heard.offered = offered or heard.offered
    return _answers_to(heard.offered, act) if answers else requests


def _offers_something(act: str, topics: tuple[str, ...], offered: tuple[str, ...], heard_offer: bool) -> bool:
    """Whether the agent offers to do something itself, or asks for consent to what it has offered."""
    itself = _OFFERS_ITSELF.search(act) and act.endswith("?") and not {"resolved", "note"} & set(topics)
    statement = _MAY_BE_HAD.search(act) and _MAY.search(act) and set(offered) & {"refuel", "plan"}
    asks = not topics and (_CONSENT.search(act) or (heard_offer and _AGREED.search(act)))
    return bool(itself or statement or asks)


def _answers_to(offered: tuple[str, ...], act: str) -> list[Request]:
    actions = [(topic, "agree" if topic == "payment" else "check") for topic in offered]
    return [Request(topic, action, act) for topic, action in actions or [("consent", "check")]]


class _Reader:
    """Reads a part of a sentence clause by clause; a clause without a verb has that of the clause before."""

    def __init__(self, act: str, heard: _Heard) -> None:
        self.heard, self.question = heard, act.endswith("?")
        pieces = re.split(r"(,|:|\band\b|\bthen\b|\balso\b|\bplus\b|&|\bor\b|\bafterwards\b)", act)
        self.clauses = [_ASIDES.sub(" ", piece) for piece in pieces[::2]]
        self.joints = ["", *pieces[1::2]]
        self.own_verbs = [_own_verb(clause) for clause in self.clauses]
        self.verb = "check" if self.question or heard.verb == "check" else ""
        self.wishes = False  # "make sure that A is off, B is on and C is 5G": each is a wish of its own
        self.asking = False  # a question about the phone, which changes nothing
        self.listed = ""  # the state in "these should be off: A, B"
        self.asked = ""  # of this sentence
        self.aside = ""  # "never" or "will": neither is over with an "and"
        self.mentioned: list[_Mention] = []

    def read(self) -> list[Request]:
        found = []
        for index, clause in enumerate(self.clauses):
            if self._says_only(index, clause.strip()):
                self.verb = ""
            else:
                found += self._requests(index, clause) or self._done_so(clause)
            self._remember_acts(index, clause, found)
            self.mentioned += _mentions(clause, clause)
        self.heard.verb = self.verb
        _share_state(self.mentioned)
        self.heard.mention(self.mentioned)
        return found

    def _says_only(self, index: int, clause: str) -> bool:
        """Whether a clause asks for nothing: what the agent does or thanks for, and what is not to be done."""
        wants = bool(_WANTS_STATE.search(clause))
        self.wishes = self.wishes or wants
        if self.aside and self.joints[index] in ("and", "or") and not re.match(r"(please|you|now|just)\b", clause):
            return True
        self.aside = ""
        if _LATER.search(clause):
            return True
        if _NEVER.search(clause) and not (wants and not self.own_verbs[index]):
            self.aside = "never"
            return True
        if _FIRST_PERSON.search(clause) and (not _TO_YOU.search(clause) or _OUR_SIDE.search(clause)):
            self.aside = "will" if _WILL.search(clause) else ""
            return True
        return not (self.wishes or self.question or _ASKS_WHETHER.search(clause)) and self._describes(clause)

    def _describes(self, clause: str) -> bool:
        """Whether a clause says what is or what may be: "turning it off can help", "the APN has been reset"."""
        if (_PASSIVE.search(clause) and not _ONCE.search(clause)) or _RESULT.search(clause):
            return True
        can = _SUBJECT.search(clause)
        subject = clause[: can.start()] if can and not _POLITE.search(clause) else ""
        if find_topics(subject) or _IT.match(subject):
            return True
        return bool(_GERUND.search(clause)) and not self.verb

    def _requests(self, index: int, clause: str) -> list[Request]:
        topics = find_topics(clause)
        own = self._clause_verb(index, clause)
        self.verb = own or self.verb
        texts = dict.fromkeys(topics, clause)
        if not topics and own and self.joints[index + 1 : index + 2] != [":"] and self._points_back(own, clause):
            texts = {m.topic: clause for m in self._meant(own, clause)}
        if "permissions" in texts and _PRONOUN.search(clause) and not _NAMED_PERMISSION.search(clause):
            texts["permissions"] += self._which_permissions(clause)
        self._remember_asked(index, clause)
        return [
            Request(topic, _action(topic, self.verb, clause), text)
            for topic, text in texts.items()
            if self.verb or topic == "resolved"
        ]

    def _done_so(self, clause: str) -> list[Request]:
        """What "please do so" asks for: the act that was spoken of last."""
        if not _DO_SO.search(clause) or self.asking:
            return []
        return [replace(request) for request in self.heard.acts]

    def _remember_acts(self, index: int, clause: str, found: list[Request]) -> None:
        verb = self.own_verbs[index]
        verb = self._way(index) if verb == "turn" else verb
        named = [Request(topic, _action(topic, verb, clause), clause) for topic in find_topics(clause)] if verb else []
        acts = [request for request in named or found if request.action != "check"]
        self.heard.acts = acts or self.heard.acts

    def _remember_asked(self, index: int, clause: str) -> None:
        """Keeps what "if so" takes up: the whole of "is it 2G or 3G?" and of "are A and B on?"."""
        own_question = _ASKS_WHETHER.search(clause) or _WANTS_STATE.search(clause) or _QUESTION.search(clause)
        if own_question or not self.asked:
            self.asked = clause if own_question or self.asking else ""
        elif self.joints[index] in ("and", "or", ",") and not self.own_verbs[index] and not _POLITE.search(clause):
            self.asked += f" {self.joints[index]} {clause}"
        else:
            self.asked = ""
        if self.asked:
            self.heard.asked = self.asked

    def _which_permissions(self, clause: str) -> str:
        """What names the permissions that "it" or "them" stands for; of a report those that are off."""
        groups = [[m for m in g if _NAMED_PERMISSION.search(m.text)] for g in self._named()]
        groups = [group for group in groups if group]
        several = _PLURAL.search(clause) or _PLURAL.search(self.heard.condition)
        pool = [m for group in groups for m in group] if several else next(iter(groups), [])
        missing = [m for m in pool if m.state == "off"]
        return " ".join(f" {m.text}" for m in missing or pool)

    def _named(self) -> tuple[list[_Mention], ...]:
        first = (self.mentioned, self.heard.heading) if self._labelled() else (self.heard.heading, self.mentioned)
        return *first, *self.heard.recent, self.heard.said

    def _labelled(self) -> bool:
        """Whether the sentence begins with what it is about: "data roaming: turn it off"."""
        return self.joints[1:2] == [":"] and only_names(self.clauses[0])

    def _points_back(self, own: str, clause: str) -> bool:
        if own == "check":
            return bool(_BARE_CHECK.search(clause) or (_PRONOUN.search(clause) and not _IS_DONE.search(clause)))
        return bool(self.heard.heading or _PRONOUN.search(clause) or _BARE_ACT.search(clause))

    def _meant(self, verb: str, clause: str) -> list[_Mention]:
        """What "it" or "them" stands for: of the things named last those that the verb can be done to, and of these
        those in another state. Of several "it" is the first, the sentence's subject."""
        groups = [[m for m in group if fits(m.topic, verb)] for group in self._named()]
        plural = bool(_PLURAL.search(clause) or _PLURAL.search(self.heard.condition))
        pool = next((group for group in groups if len({m.topic for m in group}) > plural), [])
        pool = pool or next(filter(None, groups), [])
        if verb in ("on", "off"):
            others = [m for m in pool if m.state != verb]
            pool = (not plural and [m for m in others if m.state]) or others or pool
        if verb == "on":  # nobody means airplane mode when anything else can be meant
            pool = [m for m in pool if m.topic != "airplane"] or pool
        return pool if plural or any(" or " in m.text for m in pool) else pool[:1]

    def _clause_verb(self, index: int, clause: str) -> str:
        """The verb of a clause: reseat, grant, reset, pay, approve, restart, off, on, turn (no way said), set, wish
        (for a state that is neither on nor off), check, or "" for that of the clause before."""
        if self.question and _QUESTION.search(clause):
            self.asking = True
        elif _POLITE.search(clause):
            self.asking = False
        wants, is_it = _WANTS_STATE.search(clause), _IS_IT.search(clause)
        if self.asking or (_ASKS_WHETHER.search(clause) and not _RESTART_HELPS.search(clause)):
            self.wishes = False
            return "check"
        own = self.own_verbs[index]
        if own and not (self.wishes and is_it and (wants or state(clause))):
            self.wishes = bool(wants)
            own = self._way(index) if own == "turn" else own
            return "check" if own in ("on", "off") and _OUR_SIDE.search(clause) else own
        if self.wishes and (wants or is_it):
            return self._wished(index)
        if _CHECK.search(clause):
            self.wishes = False
            return "check"
        if self.wishes and _SO_SHOULD.search(clause) and self.verb in ("on", "off"):
            return self.verb
        if (self.wishes or self._wished_together(index)) and find_topics(clause):
            return self._wished(index)
        bare = _way(clause) if only_names(clause) else ""
        checks = self.verb == "check" or (self.question and self.verb not in ("on", "off", "turn"))
        return "check" if bare and checks else bare

    def _wished_together(self, index: int) -> bool:
        """Whether the clause is the first of "A and B should be off"."""
        together = only_names(self.clauses[index]) and self.joints[index + 1 : index + 2] == ["and"]
        following = self.clauses[index + 1] if together else ""
        return bool(_SHOULD.search(following) and state(following) and not self.own_verbs[index + 1])

    def _way(self, index: int) -> str:
        """On or off for "turn A, B and C off", which says it at its end; "turn" when nothing does."""
        for later in range(index, min(index + FARTHEST, len(self.clauses))):
            if later > index and self.own_verbs[later]:
                break
            if way := _way(self.clauses[later]):
                return way
        return "turn"

    def _wished(self, index: int) -> str:
        """On, off or another wish, of "make sure that A is off" and of "make sure that A and B are off"."""
        if wished := state(self.clauses[index]):
            self.listed = "" if find_topics(self.clauses[index]) else wished
            return wished
        if self.listed and only_names(self.clauses[index]):
            return self.listed
        if not _IS_IT.search(self.clauses[index]):
            for later in range(index + 1, min(index + FARTHEST, len(self.clauses))):
                clause = self.clauses[later]
                if _IS_IT.search(clause) or not (self.own_verbs[later] or _CHECK.search(clause)):
                    if wished := state(clause):
                        return wished
                else:
                    break
        same = find_topics(self.clauses[index])[:1] == tuple(m.topic for m in self.mentioned[-1:])
        return self.verb if self.verb and same else "wish"  # "has the storage and SMS permissions"


def _way(clause: str) -> str:
    match = _TURN_WAY.search(clause) or _WAY.search(without_places(clause))
    return match.group(match.lastindex) if match else ""


def _own_verb(clause: str) -> str:
    """The verb that changes something, in a clause that has one."""
    said = clause if _ONCE.search(clause) else _IS_DONE_TO.sub(" ", clause)
    for verb, pattern in _VERBS:
        if pattern.search(said):
            return verb
    if not _TURN.search(clause):
        return "set" if _SET.search(clause) else ""
    way = _way(clause)
    return "set" if not way and "mode" in find_topics(clause) else way or "turn"


def _action(topic: str, verb: str, clause: str) -> str:
    if topic in TOGGLES:
        return verb if verb in ("on", "off") else "check"
    if topic == "restart":
        return "check" if verb == "check" else "do"
    if topic == "mode" and verb in ("on", "wish"):
        return "do" if _NAMED_MODE.search(clause) else "check"
    if topic == "apn" and verb == "wish":
        return "do" if _RESET.search(clause) else "check"
    return "do" if verb in _DONE_TO.get(topic, ()) else "check"


def _merged(requests: list[Request]) -> list[Request]:
    """One request per topic, action and condition: "storage" and "SMS" named apart belong together. A check of
    something that is also to be changed is left out: the change reports the state anyway. A test after a change is
    not the test before it."""
    merged: dict[tuple, Request] = {}
    changes = 0
    for index, request in enumerate(requests):
        if _said_again(request, requests[index + 1 :]):
            continue
        changes += request.action != "check"
        key = (*request.key, request.condition, changes if request.key in _TESTS else 0)
        if key in merged:
            merged[key].text += " " + request.text
        else:
            merged[key] = request
    changed = {r.topic for r in merged.values() if r.action != "check"} - {"payment", "apn"}
    return [r for r in merged.values() if r.action != "check" or r.topic not in changed]


def _said_again(request: Request, later: list[Request]) -> bool:
    """Whether a later "if it's off, turn it on and run a test" says it too: the test hangs on that."""
    if request.condition or request.topic not in TOGGLES or request.action == "check":
        return False
    return any(r.key == request.key and request.topic in find_topics(r.condition) for r in later)
