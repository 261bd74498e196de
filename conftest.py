"""Options of all tests, the product's (tests/) and the research's (research/tests)."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings
from support import llama_direct

# a busy machine is no failure
settings.register_profile("lrope", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lrope")

# `python -m lrope_gguf` must run the installed package, not the sources in the current folder
os.environ["PYTHONSAFEPATH"] = "1"

# a shell's background job ignores Ctrl-C, and so would all that the tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = "slow" in config.getoption("markexpr")
    missing = llama_direct.library() is None
    for item in items:
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("native") and missing and not os.environ.get("LROPE_REQUIRE_NATIVE"):
            item.add_marker(pytest.mark.skip(reason="no patched llama.cpp library"))
