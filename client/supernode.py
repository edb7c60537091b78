"""Flower's SuperNode, in a process that ends when it no longer works, so that it can be started again.

Its connection may end for good (a certificate that has expired, an answer that it does not expect). Flower 1.41 then
leaves its main loop, or a heartbeat thread, but not the process, which a thread for the site's own worker keeps alive:
the site would look connected and never be asked again.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback

from flwr.supernode.cli import flower_supernode


def main() -> None:
    """``python -m client.supernode`` with the options of ``flower-supernode``; SIGTERM ends it.

    Exit code 0 is Flower's own for a signal, and for a server that does not accept the site's signature.
    """
    threading.excepthook = _end
    sys.argv[0] = "flower-supernode"
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
