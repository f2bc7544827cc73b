"""The fork server of a test process; Python has one, so that all users of it share a list of imports."""

import multiprocessing
from typing import Any

context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preload"])
