"""What a person waits for: a known result, and a page that is drawn again."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import partial

from oms_core import cache
from oms_core.attacks import COMPARED
from oms_core.bench.base import STEPS, Row, Subject, row, timed
from oms_core.errors import InputError
from oms_core.files import ASSETS
from oms_core.run import Plan, Run, lookup, plan

TURNS = 5
ALLOWED = {"lookup": 0.1, "evaluate": 3.0, "rerun": 0.6}  # seconds

VISIT = """
import statistics, sys, time
from streamlit.testing.v1 import AppTest

app, model, turns = sys.argv[1:]
page = AppTest.from_file(app, default_timeout=60)
page.query_params["model"] = model
page.switch_page("pages/2_Convergence.py").run()
times = [time.perf_counter()]
for _ in range(int(turns)):
    page.run()
    times.append(time.perf_counter())
if page.session_state["context"].model != model:
    sys.exit(f"the page does not show {model}")
print(statistics.median(end - start for start, end in zip(times, times[1:])))
"""


def app_rows(subject: Subject) -> list[Row]:
    """Reading what is kept, a whole process that does, and a page."""
    evaluate = warm_evaluate(subject)  # first: whatever is missing is computed here
    planned = plan(Run(subject.name, attacks=COMPARED, steps=STEPS))
    read = statistics.median(timed(lambda: from_disk(planned)) for _ in range(TURNS))
    what = f"{len(planned.images)} pictures, {len(planned.tasks)} attacks"
    return [
        row(f"distances from the cache, {what}", read, "s", most=ALLOWED["lookup"]),
        row("evaluate from a warm cache, whole process", evaluate, "s", most=ALLOWED["evaluate"]),
        row("the page Convergence, run again", rerun(subject), "s", most=ALLOWED["rerun"]),
    ]


def from_disk(planned: Plan) -> None:
    """What is kept of a plan, with all its checksums, as if it had not been read before."""
    cache._read_finished.cache_clear()
    lookup(planned)


def warm_evaluate(subject: Subject) -> float:
    """Seconds of a whole `evaluate` process whose distances are known."""
    command = [sys.executable, "-m", "oms_core", "evaluate", "--model", subject.name, "--json"]
    process = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    process()
    return statistics.median(timed(process) for _ in range(TURNS))


def rerun(subject: Subject) -> float:
    """Seconds in which the server answers a visitor's choice, in a process that the engine does not know.

    Raises:
        InputError: the model is neither built in nor a folder, and no page can show it.
    """
    name, environment = subject.name, {}
    if os.path.isdir(name):
        name = os.path.realpath(name)
        environment = {"OMS_MODELS": os.path.dirname(name)}  # as its owner would open it
    elif not subject.model.card and subject.model.family != "ideal":
        raise InputError(f"A page shows built-in models and folders; {name} is neither, so leave out the part app.")
    command = [sys.executable, "-W", "ignore", "-c", VISIT, str(ASSETS.parent / "app.py"), name, str(TURNS)]
    where = {"cwd": ASSETS.parent, "env": os.environ | environment}
    done = subprocess.run(command, check=True, capture_output=True, text=True, **where)
    return float(done.stdout)
