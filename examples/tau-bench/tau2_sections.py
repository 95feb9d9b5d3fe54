"""A message of the agent cut where a list item or a heading begins something of its own.

    sections("Please check:\\n1. **VPN**: Is it on? If so, disconnect it.\\n2. **Wi-Fi**: Is it off?")
        Section("please check:"), Section("vpn: is it on? ...", heading="vpn"), Section("wi-fi: ...", heading="wi-fi")

A section with a heading is read on its own: "it" is what the heading names, and no verb and no condition goes over to
the next. Lists of mere names stay in the text around them. A library, used by tau2_understanding.py.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from tau2_conditions import LED_BY, VERB
from tau2_topics import find_topics, only_names

NEW_ACT = re.compile(rf"{LED_BY}(if\b|check\b|tell\b|make sure\b|ensure\b|{VERB})")
_MARK = re.compile(r"\d+\ufe0f?\u20e3|\(?\d+[.)](?=\W)|#+(?= )|[-•*·▪◦](?=\s)|[✅❌☑✔➡👉🔹🔸▶][\ufe0f]?")
_STEP = re.compile(r"\W*(step )?\d+\s*[-:.)]\s*")
_HEAD = re.compile(r"(?P<head>[^:.?!;→,]{2,60}?)\s*(?:: | -+ | ?— ?|→)\s*(?P<rest>\S.*)")
_SPEAKS = re.compile(rf"{NEW_ACT.pattern}|.*(\?|\b(if|please|make sure|ensure|should|must|needs?)\b)|(\S+ ){{2,}}.*\.")
_ARROW = re.compile(r" ?→ ?(?=(so |then |and )*(if|please|can you|could you|make sure|\w+ it\b))")
# What comes before a list of states that is more than a report.
_ASKS_FOR_STATES = re.compile(
    r"\b(please|set|toggle|apply|make sure|ensure|should|change|adjust|configure|switch|turn"
    r"|needs?|confirm|check|verify)\b"
)
_SWITCHED = re.compile(r"(?P<what>[^:→]+?)(:| [-—→]) (?P<way>on|off|enabled|disabled)[.,;]?$")


@dataclass
class Section:
    """A part of the message; heading: what its heading says, "" for a part without one."""

    text: str
    heading: str = ""


@dataclass
class _Line:
    indent: int
    mark: str  # "1", "#", "-" or ""
    bold: bool  # throughout
    text: str  # without the mark
    after_blank: bool

    @classmethod
    def read(cls, raw: str, after_blank: bool, asked: bool) -> _Line:
        text = raw.strip()
        found = _MARK.match(text)
        mark = found[0] if found else ""
        text = text[len(mark) :].strip()
        bold = bool(re.fullmatch(r"\*\*[^*]+\*\*\W*", text))
        text = _ARROW.sub(" - ", plain(text))
        text = _switched(text) if asked else text
        kind = "#" if "#" in mark else "1" if re.search(r"\d", mark) else "-" if mark else ""
        return cls(len(raw) - len(raw.lstrip()), kind, bold, text, after_blank)

    @property
    def unnumbered(self) -> str:
        return _STEP.sub("", self.text, count=1) if _STEP.match(self.text) else self.text

    def inline_heading(self) -> str:
        """What names the topic of a line that goes on with something of its own: "vpn" of "vpn: turn it off"."""
        found = _HEAD.match(self.unnumbered)
        if not found or not find_topics(found["head"]) or not _SPEAKS.match(found["rest"]):
            return ""
        return found["head"] if self.mark or only_names(found["head"]) else ""

    def heads(self, following: _Line | None) -> str:
        """The heading that the line is for the lines after it: "airplane mode" of "### step 1: airplane mode"."""
        if not following or not find_topics(self.text) or len(self.text) > 60 or self.text.endswith("?"):
            return ""
        below = following.indent > self.indent or (
            following.indent == self.indent and following.mark not in ("", self.mark)
        )
        titled = self.mark == "#" or (self.bold and self.mark != "-") or self.text != self.unnumbered
        apart = titled and (following.mark != self.mark or (not self.mark and following.bold != self.bold))
        return self.unnumbered if apart or (self.mark and below and not following.after_blank) else ""


def plain(text: str) -> str:
    """The text in lower case, with one kind of apostrophe and without bold type."""
    return re.sub(r"[’`]", "'", text.lower()).replace("**", "").replace("–", "-")


def _switched(text: str) -> str:
    """ "mobile data on" for "mobile data: on", which is a thing and its state and no heading."""
    found = _SWITCHED.fullmatch(text)
    return f"{found['what']} {found['way']}" if found and only_names(found["what"]) else text


def sections(text: str) -> list[Section]:
    lines = _lines(text)
    found, head = [Section("")], None  # head: the line that heads the section
    for line, following in itertools.zip_longest(lines, lines[1:]):
        inline, heading = line.inline_heading(), line.heads(following)
        if inline or heading:
            found.append(Section("", inline or heading))
            head = line
        elif head and _ends(head, line):
            found.append(Section(""))
            head = None
        end = "." if heading and not inline else ""
        found[-1].text += f"\n{_bullet(line)}{line.text}{end}"
    return [section for section in found if section.text.strip()]


def _bullet(line: _Line) -> str:
    return "- " if line.mark else ""


def _lines(text: str) -> list[_Line]:
    found, blank, asked = [], False, False
    for raw in text.split("\n"):
        if raw.strip():
            found.append(_Line.read(raw, blank, asked))
            if not found[-1].mark and not _SWITCHED.fullmatch(plain(raw.strip())):
                asked = bool(_ASKS_FOR_STATES.search(raw.lower()))
        blank = not raw.strip()
    return found


def _ends(head: _Line, line: _Line) -> bool:
    """Whether the line is no longer under the heading."""
    if line.indent > head.indent:
        return False
    if line.mark:
        return line.mark == head.mark
    return line.after_blank and head.mark != "#"
