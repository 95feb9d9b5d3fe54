"""Model text and token ids on one side, OpenAI messages with tool calls on the other.

Two halves:
- `parse_turn`, `render_turn`: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the dialect of Qwen3.
- `ChatTemplate`: token ids of the first prompt, later of new messages alone: no sampled token is ever rendered again.

A library: used by token_agent.py, generate_with_tau.py, chat_agent.py and evaluate_tau2.py.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tau2_episode import INVALID_TOOL_CALL, AgentToolCall, AgentTurn
from tau2_errors import BadInput

OPEN, CLOSE = "<tool_call>", "</tool_call>"
LONG_TEXT = 1000  # characters; a longer text is mostly the system prompt, the same in every episode
DEEPEST = 20  # levels of a call's arguments
MAX_QUOTED = 400  # characters of a broken call that are kept in the record


# ---------------------------------------------------------------------------------------------------------------------
# Text -> turn


@dataclass
class ParsedTurn:
    """One model turn: what is delivered (`turn`), and what nobody is shown (`aside`): thoughts, and text beside tool
    calls (`beside`). is_empty: neither a text nor a call was said, and the call of `turn` stands for that."""

    turn: AgentTurn
    aside: str = ""
    beside: str = ""
    is_empty: bool = False


def parse_turn(text: str, tools: Sequence[dict], control_tokens: Sequence[str] = ()) -> ParsedTurn:
    """Read one assistant turn.

    text: the decoded turn, with or without its end token. tools: OpenAI schemas. control_tokens: token texts such as
    `<|im_start|>` that must never reach the customer. A call that cannot be executed (broken JSON, unclosed tag,
    unknown name, wrong argument names) becomes an `AgentToolCall` with `error`; an empty turn becomes one too, because
    tau2 has no empty message. A call that the model only thought about is none. Never raises.
    """
    thought, said = _split_thinking(text)
    spoken, bodies = _split_calls(said)
    spoken = _strip_control(spoken, control_tokens)
    if bodies:
        calls = [_read_call(body, closed, tools) for body, closed in bodies]
        return ParsedTurn(AgentTurn(tool_calls=calls), "\n".join(filter(None, (thought, spoken))), spoken)
    if not spoken:
        calls = [_invalid("", "the message is empty: write text or call a tool")]
        return ParsedTurn(AgentTurn(tool_calls=calls), thought, is_empty=True)
    return ParsedTurn(AgentTurn(content=spoken), thought)


def _split_thinking(text: str) -> tuple[str, str]:
    """What the model thought, and what it says. Thought is all up to the last `</think>`, as in Qwen3's template, for
    generation prompts may end with `<think>`; and all behind a `<think>` that was never closed."""
    before, _, rest = text.rpartition("</think>")
    said, _, unclosed = rest.partition("<think>")
    return re.sub("</?think>", "", before + unclosed).strip(), said


def _split_calls(text: str) -> tuple[str, list[tuple[str, bool]]]:
    """Text outside the tags, and per call its body and whether its tag was closed."""
    spoken, calls, rest = [], [], text
    while OPEN in rest:
        before, rest = rest.split(OPEN, 1)
        spoken.append(before)
        end = rest.find(CLOSE)
        next_open = rest.find(OPEN)
        if end < 0 or 0 <= next_open < end:
            cut = next_open if next_open >= 0 else len(rest)
            calls.append((rest[:cut], False))
            rest = rest[cut:]
        else:
            calls.append((rest[:end], True))
            rest = rest[end + len(CLOSE) :]
    if CLOSE in rest:
        calls.append((rest, False))
        rest = ""
    spoken.append(rest)
    return "".join(spoken).strip(), calls


def _strip_control(text: str, control_tokens: Sequence[str]) -> str:
    """Remove control-token text until none is left (a removal can join two halves into a new one)."""
    before = None
    while before != text:
        before = text
        for token in (OPEN, CLOSE, *control_tokens):
            text = text.replace(token, "")
    return text.strip()


def _read_call(body: str, closed: bool, tools: Sequence[dict]) -> AgentToolCall:
    if not closed:
        return _invalid(body, f"the tool call has no {CLOSE} or no {OPEN}: write {OPEN}, one JSON object, {CLOSE}")
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        return _invalid(body, f"the tool call is not valid JSON ({str(error)[:80]})")
    return read_call(call, tools, body)


def read_call(call: Any, tools: Sequence[dict], said: str) -> AgentToolCall:
    """{"name": ..., "arguments": ...} checked against the tools; one with `error`, quoting `said`, if it cannot be
    executed."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return _invalid(said, 'the tool call is not an object with "name" and "arguments"')
    arguments, problem = _read_arguments(call.get("arguments", {}))
    problem = problem or _unusable(arguments) or _check_against(call["name"], arguments, tools)
    if problem:
        return replace(_invalid(said, problem), asked_for=call["name"].encode(errors="replace").decode()[:60])
    return AgentToolCall(name=call["name"], arguments=arguments)


def _read_arguments(value: Any) -> tuple[dict, str | None]:
    """Arguments come as an object or, from some models, as a string that holds one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}, '"arguments" is a string that is not valid JSON'
    return (value, None) if isinstance(value, dict) else ({}, '"arguments" is not a JSON object')


def _unusable(arguments: dict) -> str | None:
    """What JSON can hold and neither a tokenizer nor a file can: half a surrogate pair, a hundred nested lists."""
    if _depth(arguments) > DEEPEST:
        return f'"arguments" is nested more than {DEEPEST} deep'
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return '"arguments" holds half of a surrogate pair'
    return None


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        children = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [child for group in children for child in group]
    return depth


def _check_against(name: str, arguments: dict, tools: Sequence[dict]) -> str | None:
    """What is wrong with the call, judged by the schemas' names only; types and values are the tool's own business."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if name not in schemas:
        return f"there is no tool named {name[:60]!r}; the tools are: {', '.join(schemas)}"
    known = schemas[name].get("properties") or {}
    missing = [key for key in schemas[name].get("required") or [] if key not in arguments]
    unknown = [str(key)[:60] for key in arguments if key not in known]
    if missing:
        return f"{name}: missing argument(s) {', '.join(missing)}"
    if unknown:
        return f"{name}: unknown argument(s) {', '.join(unknown)}; it takes: {', '.join(known) or 'none'}"
    return None


def _invalid(body: str, problem: str) -> AgentToolCall:
    quoted = {"text": body.strip()[:MAX_QUOTED]}
    return AgentToolCall(name=INVALID_TOOL_CALL, arguments=quoted, error=f"Error: {problem}")


# ---------------------------------------------------------------------------------------------------------------------
# Turn -> text and messages


def render_turn(turn: AgentTurn) -> str:
    """The text a model writes to say `turn` (no end token); the same characters that the chat template renders."""
    if turn.tool_calls:
        return "\n".join(f"{OPEN}\n{_call_json(call.name, call.arguments)}\n{CLOSE}" for call in turn.tool_calls)
    return turn.content or ""


def _call_json(name: str, arguments: dict) -> str:
    return f'{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'


def assistant_message(turn: AgentTurn, call_ids: Sequence[str] = ()) -> dict:
    """`turn` as an OpenAI assistant message; tool calls are structured, with dict arguments."""
    if not turn.tool_calls:
        return {"role": "assistant", "content": turn.content or ""}
    ids = call_ids or [f"call_{i}" for i in range(len(turn.tool_calls))]
    calls = [
        {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call_id, call in zip(ids, turn.tool_calls, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


# ---------------------------------------------------------------------------------------------------------------------
# Messages -> token ids


class ChatTemplate:
    """Token ids of a conversation that grows by appending, from any chat template that shows tools, calls and results
    and closes turns with one token.

    `prompt` renders the whole start once. `following` gives only the ids that new messages add after a turn that the
    model closed itself: the template's text between the turns, the messages, and the next generation prompt. It takes
    them from a small dummy conversation, so a template that rewrites earlier turns (Qwen3 does) cannot change history.

    Customer and tool text is placed after rendering and tokenised without any added token, so `<|im_end|>` typed by a
    customer is six ordinary tokens. Everything between two control tokens is tokenised in one piece, as in a full
    render.

    tokenizer: a fast Hugging Face tokenizer with a chat template. template_kwargs: passed to the template (for example
    enable_thinking). Raises BadInput when the template or the tokenizer does not behave as described.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise BadInput(f"{tokenizer.name_or_path}: needs a fast tokenizer (a tokenizer.json file)")
        if not tokenizer.chat_template:
            raise BadInput(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
        self.tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self._controls = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._split = re.compile("|".join(re.escape(t) for t in sorted(self._controls, key=len, reverse=True)))
        self._plain = _without_added_tokens(tokenizer)
        self._mark = f"TEXT{secrets.token_hex(8)}N"
        self._following_text = lru_cache(maxsize=512)(self._render_following)
        self._prompt_text = lru_cache(maxsize=8)(self._render_prompt)
        self._long_text_ids = lru_cache(maxsize=8)(self._plain_ids)
        self.end_text = self._find_end_of_turn()
        self.end_id = self._controls[self.end_text]
        self._self_check()

    @property
    def control_tokens(self) -> list[str]:
        """Texts that must never reach the customer: every added token of the tokenizer."""
        return list(self._controls)

    def prompt(self, messages: Sequence[dict], tools: Sequence[dict]) -> list[int]:
        """Ids of `messages` (system first) with the tool list and the generation prompt."""
        marked, contents = self._mark_contents(messages)
        # Of a start, only the marked texts differ between episodes.
        return self._encode(self._prompt_text(json.dumps(marked), json.dumps(tools)), contents)

    def following(self, messages: Sequence[dict]) -> list[int]:
        """Ids that follow the model's end token when `messages` (user or tool) arrive, with the generation prompt."""
        marked, contents = self._mark_contents(messages)
        shape = tuple((m["role"], m.get("name"), m["content"]) for m in marked)
        return self._encode(self._following_text(shape), contents)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, without the token that closes the turn."""
        ids = list(ids)
        if ids and ids[-1] in (self.end_id, self.tokenizer.eos_token_id):
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- rendering

    def _render(self, messages: Sequence[dict], tools: Sequence[dict] | None, generate: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tools=tools or None, add_generation_prompt=generate, tokenize=False, **self._kwargs
        )

    def _render_prompt(self, messages: str, tools: str) -> str:
        return self._render(json.loads(messages), json.loads(tools))

    def _mark_contents(self, messages: Sequence[dict]) -> tuple[list[dict], list[str]]:
        """Replace customer and tool text by marks; outer white space stays, because some templates trim it."""
        marked, contents = [], []
        for message in messages:
            if message["role"] in ("user", "tool"):
                text = message.get("content") or ""
                core = text.strip()
                lead, _, trail = text.partition(core) if core else ("", "", "")
                message = {**message, "content": f"{lead}{self._mark}{len(contents)}X{trail}"}
                contents.append(core or text)
            marked.append(message)
        return marked, contents

    def _render_following(self, shape: tuple[tuple, ...]) -> str:
        """Template text from after the assistant's end token; cached by the messages' shape, which holds no text.
        Raises BadInput when the template leaves out one of the messages or the turn before them."""
        new = [_message(i, *values) for i, values in enumerate(shape)]
        last = f"{self._mark}LAST"
        before = [{"role": "user", "content": "x"}, _dummy_turn(new, last)]
        rendered = self._after(last, self._render([*before, *new], None), "the agent's tool calls")
        text = rendered.partition(self.end_text)[2]
        for message in new:
            self._require(message["content"].strip(), text, f"the text of a {message['role']} message")
        return text

    def _after(self, words: str, rendered: str, what: str) -> str:
        self._require(words, rendered, what)
        return rendered.rpartition(words)[2]

    def _require(self, words: str, rendered: str, what: str) -> None:
        if words not in rendered:
            raise BadInput(
                f"{self.tokenizer.name_or_path}: the chat template leaves out {what}; take a model whose template "
                "shows a whole dialogue with tools, as Qwen3's does, or give this tokenizer such a template"
            )

    def _find_end_of_turn(self) -> str:
        last = f"{self._mark}LAST"
        turns = [_message(0, role, None, text) for role, text in (("user", "x"), ("assistant", last), ("user", "y"))]
        match = self._split.search(self._after(last, self._render(turns, None), "the agent's text"))
        if match is None:
            raise BadInput(f"{self.tokenizer.name_or_path}: the chat template ends turns without a special token")
        return match.group()

    # -- tokenising

    def _encode(self, rendered: str, contents: Sequence[str]) -> list[int]:
        ids, plain = [], []

        def flush() -> None:
            if plain:
                text = "".join(plain)
                ids.extend(self._long_text_ids(text) if len(text) > LONG_TEXT else self._plain_ids(text))
                plain.clear()

        for index, piece in enumerate(re.split(f"{self._mark}(\\d+)X", rendered)):
            if index % 2:
                plain.append(contents[int(piece)])
                continue
            start = 0
            for match in self._split.finditer(piece):
                plain.append(piece[start : match.start()])
                flush()
                ids.append(self._controls[match.group()])
                start = match.end()
            plain.append(piece[start:])
        flush()
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _self_check(self) -> None:
        """On a fixed conversation both methods must give the ids of a full render, and nothing may be missing there: a
        template that knows no tools passes them over without an error."""
        user = {"role": "user", "content": 'My "phone"\nis naïve: 12 é.'}
        start = [{"role": "system", "content": "You help."}, {"role": "assistant", "content": "Hi!"}, user]
        result = _message(0, "tool", _DUMMY_NAME, '{"a": ["x", 1]}')
        shown = self._render(start, [_DUMMY_TOOL])
        self._require(_DUMMY_NAME, shown, "the tools")
        self._compare(self.prompt(start, [_DUMMY_TOOL]), shown, whole=True)
        for message in start:
            self._require(message["content"], shown, f"the text of the first {message['role']} message")
        for new in ([user], [result], [result, _message(1, "tool", _DUMMY_NAME, "Error: no")]):
            full = self._render([*start, _dummy_turn(new, "done"), *new], [_DUMMY_TOOL])
            self._compare([self.end_id, *self.following(new)], full, whole=False)

    def _compare(self, ids: list[int], rendered: str, whole: bool) -> None:
        expected = self.tokenizer.encode(rendered, add_special_tokens=False)
        if ids != (expected if whole else expected[-len(ids) :]):
            raise BadInput(f"{self.tokenizer.name_or_path}: this chat template cannot be extended turn by turn")


_DUMMY_NAME = "self_check_tool"  # a word that no template writes of its own
_DUMMY_TOOL = {
    "type": "function",
    "function": {
        "name": _DUMMY_NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def _dummy_turn(new: Sequence[dict], text: str) -> dict:
    """An assistant turn that `new` can follow: tool results need calls."""
    results = [message for message in new if message["role"] == "tool"]
    if not results:
        return {"role": "assistant", "content": text}
    calls = [AgentToolCall(name=_DUMMY_NAME, arguments={"x": text}) for _ in results]
    return assistant_message(AgentTurn(tool_calls=calls), [message["tool_call_id"] for message in results])


def _message(position: int, role: str, name: str | None, content: str) -> dict:
    """A new message as the template sees it. Call ids are by position: no dialect that we parse writes them."""
    message = {"role": role, "content": content}
    if role == "tool":
        message |= {"tool_call_id": f"call_{position}", "name": name or _DUMMY_NAME}
    return message


def _without_added_tokens(tokenizer: Any) -> Any:
    """The same tokenizer model with no added tokens: no text can become a control token."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(spec))


@lru_cache(maxsize=4)
def load_chat_template(path: str, template_kwargs_json: str = "{}") -> ChatTemplate:
    """The `ChatTemplate` of an HF folder, loaded once per process. Raises BadInput without a usable tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=_model_type(Path(path)), trust_remote_code=False)
    except Exception as error:  # a broken file raises what the library that reads it happens to raise
        raise BadInput(f"{path}: no tokenizer could be loaded from there ({_in_short(error)})") from error
    try:
        return ChatTemplate(tokenizer, json.loads(template_kwargs_json))
    except BadInput:
        raise
    except Exception as error:  # so does a template, for it is a program
        raise BadInput(f"{path}: its chat template cannot be used ({_in_short(error)})") from error


def _model_type(folder: Path) -> Any:
    """A config with all that AutoTokenizer reads of one where the tokenizer's own file names its class: the model's
    whole config brings a thousand modules, 1.3 seconds of a start. None where transformers has to look for itself."""
    from transformers import PretrainedConfig

    files = folder / "config.json", folder / "tokenizer_config.json"
    if not all(file.is_file() for file in files):
        return None  # a name on the hub
    model, tokenizer = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    if "model_type" not in model or "tokenizer_class" not in tokenizer:
        return None
    config = PretrainedConfig(name_or_path=str(folder))
    config.model_type = model["model_type"]
    return config


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
