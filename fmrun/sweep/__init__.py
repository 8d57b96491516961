"""`fmrun sweep`: a grid over any fields × seeds. The runs' folders are its only state, so that the same command goes on.

grid.py       the grid: values, combinations, names
item.py       one run: where it stands, and what brings it further
preflight.py  every combination checked before the first run starts
launch.py     where the runs' processes live: on this machine, on Slurm, on Ray
"""
