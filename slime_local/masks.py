"""Token ids and loss mask of a whole dialogue: what SFT trains. `--loss-mask-type` names the way of rendering it."""

from functools import cached_property
from typing import Any

PROBE = {"role": "user", "content": "probe"}

Message = dict[str, Any]


class LossMasker:
    """Renders dialogues with the tokenizer's chat template and marks what the assistant wrote.

    Trained are an assistant turn's content, its calls, its end-of-turn token and the newline after it. A message with
    `"step_loss_mask": 0` is left out. "qwen3" renders consecutive tool results as the one turn that the template makes
    of them, "qwen" renders every message alone.
    """

    def __init__(self, tokenizer: Any, kind: str = "qwen"):
        self.tokenizer = tokenizer
        self.kind = kind

    def mask(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> tuple[list[int], list[int]]:
        """(ids, mask), equally long. Only the first message is rendered together with the tools."""
        ids: list[int] = []
        mask: list[int] = []
        for position, group in enumerate(self._turns(messages)):
            turn = self._first(group, tools) if position == 0 else self._later(group)
            ids += turn
            mask += self._turn_mask(group[0], len(turn))
        return ids, mask

    def _turns(self, messages: list[Message]) -> list[list[Message]]:
        turns: list[list[Message]] = []
        for message in messages:
            joins = self.kind == "qwen3" and message["role"] == "tool" and turns and turns[-1][0]["role"] == "tool"
            if joins:
                turns[-1].append(message)
            else:
                turns.append([message])
        return turns

    def _turn_mask(self, message: Message, length: int) -> list[int]:
        if message["role"] != "assistant" or message.get("step_loss_mask", 1) != 1:
            return [0] * length
        header = min(self._header_length, length)
        return [0] * header + [1] * (length - header)

    def _first(self, group: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        if self.kind == "qwen":
            return self._render(group, tools)
        return self._render([*group, PROBE], tools)[: -len(self._probe_turn)]

    def _later(self, group: list[Message]) -> list[int]:
        if self.kind == "qwen":
            start = 0 if group[0]["role"] == "system" else self._system_length
            return self._render(group)[start:]
        return self._render([PROBE, *group])[len(self._render([PROBE])) :]

    def _render(self, messages: list[Message], tools: Any = None, generate: bool = False) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, add_generation_prompt=generate, return_dict=False
        )

    @cached_property
    def _probe_turn(self) -> list[int]:
        return self._render([PROBE, PROBE])[len(self._render([PROBE])) :]

    @cached_property
    def _system_length(self) -> int:
        """Tokens of the system message that the template adds to a dialogue without one."""
        return len(self._render([PROBE])) - len(self._probe_turn)

    @cached_property
    def _header_length(self) -> int:
        """Tokens of the line that opens an assistant turn."""
        return len(self._render([PROBE], generate=True)) - len(self._render([PROBE]))


def response_length(mask: list[int]) -> int:
    """Tokens from the first trained one to the end; 0 when nothing is trained."""
    return len(mask) - mask.index(1) if 1 in mask else 0
