"""Studies: many simulations side by side, resumable, and what they say together.

file.py reads STUDY.toml and plan.py makes cells of it; run.py runs them, cell.py is one of them; collect.py reads what
they reached; compare.py and verdict.py are the statistics and the words; tables.py, figures.py, page.py and files.py
what is written, show.py what a person sees.
"""
