"""The logger of what goes on: stages, epochs, photos embedded, each with the time left."""

from __future__ import annotations

import logging
import os

FORMAT, DATES = "%(asctime)s vipr %(message)s", "%H:%M:%S"
LOG = logging.getLogger("vipr")


def attach(*, on_platform: bool = False) -> None:
    """Let LOG write to the file that $VIPR_LOG names (`vipr run` reads it), else on a platform to
    stderr; elsewhere it stays silent. May be called again.
    """
    file = os.environ.get("VIPR_LOG")
    if any(handler.name == "vipr" for handler in LOG.handlers) or not (file or on_platform):
        return
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    handler.set_name("vipr")
    handler.setFormatter(logging.Formatter(FORMAT, DATES))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def clock(seconds: float) -> str:
    """'2:05' or '1:02:05': minutes and seconds, or hours too."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
