"""SFT rows in which the scripted teacher mends what the model got wrong (expert corrections, as in DAgger):

    python examples/tau-bench/teacher_traces.py --local_dir data --from-rollouts RUN --mend 1 --style checklist

A library, used by teacher_traces.py. An episode of RUN that the model failed is played again: same task, seed and
customer. The model's turns stand as long as they are the teacher's; from the first that is not, the teacher goes on.
With --keep-mistakes that turn stays in the dialogue, untrained, and the teacher then says what it would have said in
its place; a turn that ended the episode, or that could not be executed, is left out all the same. Kept are the
episodes that are solved so.

Ross, Gordon, Bagnell: A reduction of imitation learning and structured prediction to no-regret online learning, 2011.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass

from rollout_traces import Recorded, agent_turns
from tau2_domains import HAND_OVER, tasks_by_id
from tau2_episode import INVALID_TOOL_CALL, AgentToolCall, AgentTurn, Episode, EpisodeConfig, run_episode
from tau2_errors import BadInput
from tau2_teacher import ScriptedTeacher


@dataclass
class Mended:
    """A solved episode that the model began and the teacher ended. own_turns: how many agent turns are the model's;
    mistake: the model's turn that is not trained (the first is 0), if one is kept."""

    recorded: Recorded
    episode: Episode
    config: EpisodeConfig
    own_turns: int
    mistake: int | None


class TakingOver:
    """Plays the model's turns while they are the teacher's, then the teacher's."""

    def __init__(self, teacher: ScriptedTeacher, recorded: list[AgentTurn | None], keep_mistake: bool) -> None:
        self.teacher, self.recorded, self.keep_mistake = teacher, recorded, keep_mistake
        self.own_turns = 0
        self.mistake: int | None = None
        self.taken_over = False
        self.owed: AgentTurn | None = None

    async def start(self, messages: list[dict], tools: list[dict]) -> None:
        await self.teacher.start(messages, tools)

    async def act(self, new_messages: list[dict]) -> AgentTurn:
        if self.owed is not None:  # after the mistake: whatever came of it, the step is still to do
            turn, self.owed = self.owed, None
            return turn
        turn = await self.teacher.act(new_messages)
        if self.taken_over:
            return turn
        own = self.recorded[self.own_turns] if self.own_turns < len(self.recorded) else None
        if own is not None and same_turn(own, turn):
            self.own_turns += 1
            return turn
        self.taken_over = True
        if own is None or not self.keep_mistake or self.own_turns == len(self.recorded) - 1:
            return turn
        self.mistake, self.owed = self.own_turns, turn
        return own


def same_turn(a: AgentTurn, b: AgentTurn) -> bool:
    """The same words, or the same calls (the summary of a hand-over is free)."""

    def calls(turn: AgentTurn) -> list:
        return [(call.name, call.name != HAND_OVER and call.arguments) for call in turn.tool_calls]

    return calls(a) == calls(b) and (a.content or "").strip() == (b.content or "").strip()


def read_turn(message: dict) -> AgentTurn | None:
    """A recorded turn in OpenAI form, to be played again; None for one with a call that could not be executed."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    if any(call["name"] == INVALID_TOOL_CALL for call in calls):
        return None
    return AgentTurn(message["content"] or None, [AgentToolCall(call["name"], call["arguments"]) for call in calls])


def mend(
    failed: dict[str, list[Recorded]], per_task: int, style: str, wordings: int, keep_mistakes: bool = False
) -> tuple[list[Mended], Counter[str]]:
    """At most `per_task` different mended episodes of each task, and why others are none. Of the teacher's first
    `wordings` the one that the model followed longest goes on. Raises BadInput for a customer that is a model."""
    return asyncio.run(_mend_all(failed, per_task, style, wordings, keep_mistakes))


async def _mend_all(
    failed: dict[str, list[Recorded]], per_task: int, style: str, wordings: int, keep_mistakes: bool
) -> tuple[list[Mended], Counter[str]]:
    kept: list[Mended] = []
    dropped: Counter[str] = Counter()
    for _, episodes in sorted(failed.items()):
        dialogues: set[str] = set()
        for recorded in episodes:
            if len(dialogues) == per_task:
                break
            mended = await _mend(recorded, style, wordings, keep_mistakes)
            dialogue = json.dumps(mended.episode.messages, sort_keys=True)
            if not mended.episode.solved:
                dropped[f"not mended, {mended.episode.end_reason.value}"] += 1
            elif dialogue not in dialogues:
                dialogues.add(dialogue)
                kept.append(mended)
    return kept, dropped


async def _mend(recorded: Recorded, style: str, wordings: int, keep_mistake: bool) -> Mended:
    tries = [await _play(recorded, style, wording, keep_mistake) for wording in range(wordings)]
    return max(tries, key=lambda mended: (mended.own_turns, mended.episode.solved))


async def _play(recorded: Recorded, style: str, wording: int, keep_mistake: bool) -> Mended:
    config = config_of(recorded)
    turns = [read_turn(turn) for turn in agent_turns(recorded.messages)]
    agent = TakingOver(ScriptedTeacher(style, wording=wording), turns, keep_mistake)
    episode = await run_episode(tasks_by_id(recorded.domain)[recorded.task_id], agent, config, recorded.record["seed"])
    return Mended(recorded, episode, config, agent.own_turns, agent.mistake)


def config_of(recorded: Recorded) -> EpisodeConfig:
    """The settings of a recorded episode. Raises BadInput where its customer cannot be asked again."""
    user = dict(recorded.record["user"])
    if user["kind"] != "scripted":
        raise BadInput(
            f"--mend: {recorded.source}: its customer is {user['kind']!r}; only the scripted one can be played again"
        )
    return EpisodeConfig(
        recorded.domain,
        recorded.record["prompt"],
        user_args={"mood": user["mood"]} if "mood" in user else {},
        redraw_ids=bool(recorded.record.get("redraw_ids")),
    )
