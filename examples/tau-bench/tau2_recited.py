"""A customer without a model for scenarios in free text (retail, airline): it reads its briefing out.

    python examples/tau-bench/evaluate_tau2.py --domain retail --user recited --agent do-nothing --output-path x.json

Its first message is its scenario as tau2 wrote it: what it wants, what it knows, what it does not know, how it is to
behave. Asked who it is, it repeats what it knows; asked to confirm, it agrees to what that note says; asked anything
else, it repeats the sentence of the note that has most words in common with the question. It ends when it is
transferred, when the agent twice says that all is done, or when it gets nowhere. It sees the scenario and the agent's
words, never gold actions, tool results or the database.

**What it is not.** It withholds nothing (a task that has the customer hide something, change its mind or insist is
told so in advance), presses nobody, decides nothing by itself and speaks in the second person of its note. So it can
show that a rollout, a reward or a prompt works, and whether an agent finds the right calls for a request that it knows
in full. It cannot show how an agent talks to people: that takes an LLM as customer. Numbers made with it name it and
compare with no others. It has no answer to a question that needs a new decision.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from tau2_understanding import TRANSFERRED
from tau2_users import STOP, TRANSFER

RECITED_VERSION = "1"
PATIENCE = 3  # the same message, or messages about nothing in the note, before hanging up
CLOSINGS = 2  # one offer to end may come too early

_FIELDS = (  # of a scenario's instructions, and what is said before each
    ("reason_for_call", "This is what I want."),
    ("known_info", "About me."),
    ("unknown_info", "What I do not know."),
    ("task_instructions", "And further."),
)
_CLOSES = re.compile(
    r"\banything else\b|\bis there more\b|\ball (is |are )?done\b|\bgoodbye\b|\b(great|nice|good|wonderful) day\b"
    r"|\bfurther (help|assistance|questions)\b|\bassist you further\b"
)
_CONFIRMS = re.compile(
    r"\bconfirm\b|\bproceed\b|\bis (that|this) (correct|right|okay|ok)\b|\bshall i\b|\bshould i\b|\byes\b"
    r"|\bdo you agree\b|\b(would|do) you (like|want) me to\b|\bgo ahead\b"
)
_IDENTIFIES = re.compile(
    r"\bname\b|\be-?mail\b|\bzip\b|\bpostal\b|\buser id\b|\bcustomer id\b|\bid\b|\bidentity\b|\bverify\b|\bwho\b"
    r"|\bdate of birth\b|\b(reservation|confirmation|order|booking) (number|id|code)\b|\bphone\b"
)
_ABOUT_CONFIRMING = re.compile(r"\bconfirm\w*|\bchange (your|my) mind\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9#][a-z0-9#'-]{2,}")
_COMMON = frozenset(
    "the and you your are for that this with have has not but can will would like please what which want need from "
    "any our was were been all one its also help may could there their them they then than when how get let know "
    "just only into out about does did more such here sure thank thanks okay assist provide information".split()
)


class RecitedCustomer:
    """See the module's docstring. Deterministic."""

    def __init__(self, user_scenario: Any) -> None:
        told = user_scenario.instructions
        self.note = [(head, text) for name, head in _FIELDS if (text := _text_of(told, name))]
        self.known = _text_of(told, "known_info")
        self.sentences = [sentence for _, text in self.note for sentence in _sentences(text)]
        self.opened = False
        self.heard: Counter[str] = Counter()
        self.closings = self.fruitless = 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "recited", "version": RECITED_VERSION}

    def reply(self, message: Any) -> Any:
        """The next tau2 UserMessage."""
        from tau2.data_model.message import UserMessage

        return UserMessage(role="user", content=self._answer(message.content or ""), cost=0.0)

    def _answer(self, text: str) -> str:
        if not self.opened:
            self.opened = True
            return self._opening()
        text = re.sub(r"[’`]", "'", text.lower())
        if TRANSFERRED.search(text):
            return TRANSFER
        self.heard[text] += 1
        if _CLOSES.search(text):
            return self._closing()
        answer = self._about(text)
        self.fruitless = 0 if answer else self.fruitless + 1
        if max(self.fruitless, self.heard[text]) >= PATIENCE:
            return f"This isn't helping. Goodbye. {STOP}"
        return answer or "My note says nothing about that. Please do what it asks for, as far as you can."

    def _opening(self) -> str:
        return "Hello. I read you my note.\n" + "\n".join(f"{head} {text}" for head, text in self.note)

    def _closing(self) -> str:
        self.closings += 1
        if self.closings >= CLOSINGS:
            return f"No, that is all. Thank you. {STOP}"
        return "If everything in my note is done, or cannot be done, that is all."

    def _about(self, text: str) -> str:
        """What the note says to this message of the agent; "" when it says nothing."""
        if _CONFIRMS.search(text):
            said = [sentence for sentence in self.sentences if _ABOUT_CONFIRMING.search(sentence)]
            return " ".join(["Yes, as far as it is what my note says.", *said])
        if _IDENTIFIES.search(text) and self.known:
            return self.known
        return self._most_alike(text)

    def _most_alike(self, text: str) -> str:
        asked = _words(text)
        shared = [len(asked & _words(sentence)) for sentence in self.sentences]
        most = max(shared, default=0)
        return self.sentences[shared.index(most)] if most else ""


def _text_of(told: Any, name: str) -> str:
    """A field of the instructions on one line; free text as a whole counts as the first field."""
    if isinstance(told, str):
        return " ".join(told.split()) if name == _FIELDS[0][0] else ""
    text = " ".join((getattr(told, name, None) or "").split())
    return text if re.search(r"\w", text) else ""  # tau2 writes "." for nothing


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _COMMON
