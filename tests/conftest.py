"""Which tests run and in what order. Their data roots are in roots.py: it imports torch, for which
a process that only hands tests out would make the others wait.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)  # behind pytest-cov, which sees no line that ran before it
def pytest_sessionstart(session):
    config = session.config
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("roots")


def pytest_collection_modifyitems(items):
    """The longest first, or one process waits for the other's at the end; what is marked long only
    where it is asked for.
    """
    if not {"VIPR_SOAK", "VIPR_PROCESSOR"} & os.environ.keys():
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="left to `make soak`: set $VIPR_SOAK"))

    def shorter(item) -> int:
        if item.path.name == "test_whole.py":
            return 0
        return 1 if "grocery" in getattr(item, "fixturenames", ()) else 2

    items.sort(key=shorter)
