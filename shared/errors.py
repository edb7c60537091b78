"""Errors a person can cause. Each is one line that says what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input by a person: shown as one line without a traceback, exit code 2."""


class SiteRefusal(Exception):
    """A site declines to take part; only ``code`` ever leaves it.

    ``str(refusal)`` may hold file names or labels: it is for the site's own log and screen.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
