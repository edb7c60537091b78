"""Studies: many simulations side by side, resumable, and what they say together.

plan.py reads STUDY.toml, run.py runs its cells, cell.py is one of them, collect.py reads what they reached,
compare.py and verdict.py are the statistics and the words, page.py, figures.py and files.py what is written.
"""
