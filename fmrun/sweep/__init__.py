"""`fmrun sweep`: a grid over any fields × seeds, as runs that stop, resume and fail one by one, and what they show.

grid.py       what is asked for: values, combinations, names
plan.py       the sweep's folder, and which runs it still needs
preflight.py  every combination checked before the first run starts
launch.py     where a run's process lives: on this machine, or on a cluster
work.py       from the first run to the last, whatever becomes of each
display.py    what a human sees meanwhile
table.py      the comparison in the end
"""
