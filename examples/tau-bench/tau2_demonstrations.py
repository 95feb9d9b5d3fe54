"""The scripted teacher in GRPO's groups: `tau2_teacher_samples: 1` gives the last sample of every group to it.

A group that the model never solves has no advantage to learn from, and what the model has forgotten it never shows
again. The teacher plays the same task with the same customer and ids, and its words, as token ids, are trained on like
any other sample. The group's mean and deviation say how much: nothing where the model solves the task too, most where
it never does.

The teacher draws nothing, so the log-probs of its tokens are 0.0. With --use-rollout-logprobs or --use-tis a token
then weighs as much as the model's own probability of it, and what the model would never say is hardly learned; without
them the trainer takes its own log-probs, and every token weighs the same.

A library: used by generate_with_tau.py.
"""

from __future__ import annotations

from typing import Any

from openai_tool_adapter import render_turn
from tau2_domains import is_telecom
from tau2_episode import AgentTurn
from tau2_errors import BadInput
from tau2_settings import Settings
from tau2_teacher import STYLES, ScriptedTeacher
from token_agent import TokenAgent, TurnTokens


class TaughtAgent(TokenAgent):
    """A TokenAgent that says what the teacher says, in the tokens of the model; no server is asked."""

    def __init__(self, *args: Any, style: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = ScriptedTeacher(style)
        self._heard: list[dict] = []

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        await super().start(messages, tools)
        await self.teacher.start(messages, tools)

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        self._heard = new_messages
        return await super().act(new_messages)

    async def _sample(self, before: list[int], room: int) -> TurnTokens:
        text = render_turn(await self.teacher.act(self._heard))
        ids = [*self.template.tokenizer.encode(text, add_special_tokens=False), self.template.end_id]
        finish = {"type": "stop" if len(ids) <= room else "length"}
        return TurnTokens(before, ids[:room], [0.0] * len(ids[:room]), {"finish_reason": finish})


def is_taught(args: Any, settings: Settings, sample: Any) -> bool:
    """Whether the teacher plays this sample: the last tau2_teacher_samples of every group. Both hosts number the
    samples of a rollout through, group by group; those of an evaluation have no group."""
    if not settings.teacher_samples or sample.group_index is None:
        return False
    return sample.index % args.n_samples_per_prompt >= args.n_samples_per_prompt - settings.teacher_samples


def check_teacher(args: Any, settings: Settings, domain: str) -> None:
    """Raises BadInput for what the teacher cannot play."""
    if settings.teacher_style not in STYLES:
        raise BadInput(f"tau2_teacher_style is {settings.teacher_style!r}: choose one of: {', '.join(STYLES)}")
    if not settings.teacher_samples:
        return
    if not is_telecom(domain):
        raise BadInput(f"tau2_teacher_samples: there is a scripted teacher for telecom only, not for {domain}")
    size = getattr(args, "n_samples_per_prompt", None) or 1
    if settings.teacher_samples >= size:
        raise BadInput(
            f"tau2_teacher_samples is {settings.teacher_samples}: a group has {size} samples "
            "(--n-samples-per-prompt), and at least one has to be the model's own"
        )
    if getattr(args, "use_rollout_routing_replay", False) or getattr(args, "rollout_top_p", 1.0) != 1.0:
        raise BadInput(
            "tau2_teacher_samples: what the teacher says is not sampled, so there are no experts and no nucleus to "
            "replay: leave out --use-rollout-routing-replay and --rollout-top-p"
        )
