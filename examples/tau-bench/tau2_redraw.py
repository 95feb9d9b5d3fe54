"""Telecom tasks with other names, phone numbers and ids, so that a model copies them instead of remembering them.

A library: `redraw_ids` of an EpisodeConfig; --redraw-ids of evaluate_tau2.py and teacher_traces.py. Every draw comes
from (task id, seed).
"""

from __future__ import annotations

import functools
import json
import pickle
import random
import re
import string
from typing import Any

from tau2_domains import preload

_PHONE = re.compile(r"\b555-\d{3}-\d{4}\b")
_ID = re.compile(r"\b[BCDLP]\d{4,8}\b")
_FIRST_NAMES = (
    "Ada Alan Amir Anna Ben Carla Chen Clara David Diego Elena Emma Eva Felix Grace Hana Henry Ines Ivan Jack Jane "
    "Julia Karim Lara Leo Lin Lucas Maria Mark Maya Mina Nora Omar Oscar Paul Petra Rosa Ryan Sam Sara Sofia Tom Vera"
).split()
_LAST_NAMES = (
    "Adams Baker Brown Campos Clark Cohen Costa Davis Diaz Evans Fischer Garcia Gray Green Hall Hill Ito Jones Kaya "
    "King Klein Lopez Martin Meyer Moore Novak Okafor Park Patel Reed Rossi Sato Silva Stone Tanaka Wang Weber White"
).split()


def redraw(task: Any, seed: int) -> tuple[Any, tuple[bytes, bytes]]:
    """The telecom task with names, phone numbers and ids drawn anew, and (agent_db, user_db) pickled to match.

    Text, initial actions, gold actions and assertions change together; the task's id stays as it is."""
    customers, db_type, db_json = _telecom_json()
    task_json = task.model_dump_json(exclude={"id"})
    names = _draw_names(customers, task_json + db_json, random.Random(f"{task.id}:{seed}"))
    new_task = type(task).model_validate({**json.loads(_replace(task_json, names)), "id": task.id})
    new_db = db_type.model_validate_json(_replace(db_json, names))
    return new_task, (pickle.dumps(new_db), preload("telecom").user_db)


@functools.cache
def _telecom_json() -> tuple[list[tuple[str, str]], type, str]:
    """(full name, e-mail) of every customer, the database's type, and the database as JSON."""
    db = pickle.loads(preload("telecom").agent_db)
    return [(customer.full_name, customer.email) for customer in db.customers], type(db), db.model_dump_json()


def _draw_names(customers: list[tuple[str, str]], text: str, rng: random.Random) -> dict[str, str]:
    """Old string -> new string for every customer name, phone number and id in `text`, without collisions."""
    names: dict[str, str] = {}
    people = [(first, last) for first in _FIRST_NAMES for last in _LAST_NAMES]
    for (full_name, email), (first, last) in zip(customers, rng.sample(people, len(customers)), strict=True):
        names[full_name] = f"{first} {last}"
        names[email] = f"{first}.{last}@example.com".lower()
    taken = set(names.values())
    for old in sorted(set(_PHONE.findall(text)) | set(_ID.findall(text))):
        names[old] = _fresh(old, rng, taken)
    return names


def _fresh(old: str, rng: random.Random, taken: set[str]) -> str:
    """A new string of the same shape: the prefix stays (555-, or the id's letter), the other digits are drawn."""
    keep = 4 if old.startswith("555-") else 1
    while True:
        new = old[:keep] + "".join(rng.choice(string.digits) if c.isdigit() else c for c in old[keep:])
        if new not in taken and new[keep] != "0":
            taken.add(new)
            return new


def _replace(text: str, names: dict[str, str]) -> str:
    people = "|".join(re.escape(old) for old in names if " " in old or "@" in old)
    return re.sub(rf"\b(?:{_PHONE.pattern}|{_ID.pattern}|{people})\b", lambda match: names[match.group()], text)
