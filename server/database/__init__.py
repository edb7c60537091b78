"""The store: every run of a folder or federation in one database, that the dashboard and the reports read.

``schema`` names the tables, ``migrate`` makes and changes them, ``engine`` opens, ``write`` follows a run's journal,
``read`` answers. The journal, ``rounds.jsonl`` in the run folder, comes first and is never rewritten; the database can
be made anew from it, and catches up by itself on what it missed.
"""
