"""The logger of what goes on: stages, epochs, photos embedded, each with the time left."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from time import monotonic

LOG = logging.getLogger("vipr")
QUIET_S = 30.0  # between two lines of one stage


def attach(*, on_platform: bool = False) -> None:
    """Let LOG write to the file that $VIPR_LOG names (`vipr run` reads it), else on a platform to
    stderr; elsewhere it stays silent. May be called again.
    """
    file = os.environ.get("VIPR_LOG")
    if LOG.handlers or not (file or on_platform):
        return
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s vipr %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def reporter(what: str, total: int) -> Callable:
    """A function to call with how many are done: LOG hears of it, and of the time left, where
    nothing was said for QUIET_S seconds.
    """
    began = told = monotonic()

    def reached(done):
        nonlocal told
        now = monotonic()
        if now - told > QUIET_S:
            told = now
            left = clock((now - began) / done * (total - done))
            LOG.info(f"{what}: {done:,} of {total:,}, {left} left")

    return reached


def clock(seconds: float) -> str:
    """'0:02:05': hours, minutes, seconds."""
    return str(timedelta(seconds=round(seconds)))
