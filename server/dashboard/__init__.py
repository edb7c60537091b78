"""The coordinator's dashboard: pages over the store, live, that need no network.

``guard`` lets in who has the token, ``api`` answers the pages' questions from ``server.database.read``, ``live`` tells
them when something changed, ``federation`` looks at a provisioned federation and stops runs, ``models`` finds a run's
files; the pages themselves are in ``static/``. Nothing here writes to the store or to a run folder.
"""
