"""``python -m oms_core``: see `oms_core.command_line`, whose imports take a second in which Ctrl-C may come already."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

STOPPED = "\nStopped; the same command goes on from the last finished shard."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 for bad input, 130 if stopped by the user."""
    try:
        from oms_core.command_line import run_command

        return run_command(arguments)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130


def stop_at_once(*_: object) -> None:
    """Answer Ctrl-C while nothing is under way that would have to end well: at the beginning and at the end."""
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup, say
    if interruptible:
        signal.signal(signal.SIGINT, stop_at_once)
    import_module("oms_core.command_line")
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = main()
    if interruptible:
        signal.signal(signal.SIGINT, stop_at_once)
    sys.exit(code)
