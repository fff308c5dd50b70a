"""The event loop that a rival is run on: uvloop where it is installed, as who tunes such a program would."""

import asyncio
from collections.abc import Coroutine
from typing import Any


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a program to its end."""
    try:
        import uvloop  # of the extra `bench`; the suite's own quick run does without
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)
