"""Flower's SuperNode, in a process that ends when it no longer works, so that it can be started again.

Its connection may end for good (a certificate that has expired, an answer that it does not expect). Flower 1.41 then
leaves its main loop, or a heartbeat thread, but not the process, which a thread for the site's own worker keeps alive:
the site would look connected and never be asked again.

It also waits less than Flower's own: Flower asks the server for work every 3 s, looks for a message's parts that are
not there yet after 1, 2, 4, 8 and 10 s, and for the worker's reply every 0.5 s, and has no setting for any. So two
names of its module are ours; a test tells when the module changes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from functools import partial

from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

ASKS = 0.5, 3.0  # seconds between questions for work: at least and at most, the latter Flower's own
SHARE = 0.25  # of the time since the last message, between the two
IDLE = 10.0  # times as long as the last question took, so that asking does not keep a busy server from its work
LOOKS = 0.05  # seconds between looks for what the worker has ready, in this process's own memory


class Clock:
    """Stands for the module ``time`` where Flower's SuperNode waits.

    A site that worked just now is asked again soon, if its run goes on: it waits half a second at first, and then a
    share of what it has waited already. After twelve seconds it asks as seldom as Flower would. For a question costs
    the server some 10 ms, and sixty sites that all asked twice a second would leave it no time for anything else.
    """

    def __init__(self) -> None:
        self._worked = self._woke = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait in place of ``seconds``: 3 where Flower asks the server, less where it looks into its own memory."""
        now = time.monotonic()
        if seconds < ASKS[1]:
            self._worked = now
            time.sleep(min(seconds, LOOKS))
        else:
            asked = 0.0 if self._worked >= self._woke else now - self._woke
            time.sleep(min(max(SHARE * (now - self._worked), IDLE * asked, ASKS[0]), ASKS[1]))
            self._woke = time.monotonic()


def wait_less() -> None:
    """Let Flower's SuperNode in this process wait as ours."""
    start_client_internal.time = Clock()  # type: ignore[attr-defined, assignment]
    # As long in all as Flower's own, two hours.
    start_client_internal.pull_objects = partial(  # type: ignore[attr-defined]
        pull_objects, initial_backoff=0.1, backoff_cap=1.0, max_tries_per_object=None
    )


def main() -> None:
    """``python -m client.supernode`` with the options of ``flower-supernode``; SIGTERM ends it.

    Exit code 0 is Flower's own for a signal, and for a server that does not accept the site's signature.
    """
    threading.excepthook = _end
    sys.argv[0] = "flower-supernode"
    wait_less()
    status: object = 1  # a SuperNode that is well does not return
    try:
        flower_supernode()
    except SystemExit as exit_:
        status = exit_.code or 0
    except BaseException:
        traceback.print_exc()
    _leave(status if isinstance(status, int) else 1)


def _end(failure: threading.ExceptHookArgs) -> None:
    traceback.print_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    _leave(1)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # whatever threads are left


if __name__ == "__main__":
    main()
