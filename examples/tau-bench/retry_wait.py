"""How long to wait before a server that failed is asked again.

A library, used by http_client.py and tau2_llm_customer.py.
"""

from __future__ import annotations

import logging
import random
import re
import time
from email.utils import parsedate_to_datetime

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds, of our own choice
LONGEST_ASKED = 300.0  # seconds, where the server asks for them


def seconds_to_wait(tries: int, first_wait: float, retry_after: str = "") -> float:
    """Seconds until the next try after so many: doubled each time, give or take, and not less than the server's
    Retry-After asks for. What it asks for above LONGEST_ASKED is not waited for, and logged."""
    asked = asked_seconds(retry_after)
    if asked > LONGEST_ASKED:
        logger.warning("the server asks to wait %.0f s; it is asked again after %.0f s", asked, LONGEST_ASKED)
    own = first_wait * 2 ** (tries - 1) * random.uniform(0.75, 1.5)
    return max(min(own, LONGEST_WAIT), min(asked, LONGEST_ASKED))


def asked_seconds(retry_after: str) -> float:
    """The seconds of a Retry-After header, which holds a number or a date; 0 for anything else."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
