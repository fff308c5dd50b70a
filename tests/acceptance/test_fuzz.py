"""Two thousand malformed requests, as `make fuzz` sends 100,000: no 500, and nothing left behind."""

import os
import random

import pytest

from tests.fuzz.campaign import attack

SEED = int(os.environ.get("FUZZ_SEED") or random.randrange(1_000_000))
REQUESTS = 2_000


@pytest.mark.timeout(180)
async def test_malformed_requests_do_no_harm() -> None:
    report = await attack(SEED, REQUESTS, REQUESTS // 2)
    assert not report.faults(), f"FUZZ_SEED={SEED}"
    assert report.requests >= REQUESTS
    assert {"101", "200", "202", "400", "404", "413"} <= report.statuses.keys(), "what is sent is not all refused"
