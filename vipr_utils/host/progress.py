"""The logger of what goes on: stages, epochs, photos embedded, each with the time left."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

LOG = logging.getLogger("vipr")


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


def clock(seconds: float) -> str:
    """'0:02:05': hours, minutes, seconds."""
    return str(timedelta(seconds=round(seconds)))
