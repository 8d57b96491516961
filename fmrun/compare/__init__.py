"""Runs side by side: what differs, which is better and by how much, how they got there.

`comparison.compare` reads runs into plain data; `table`, `page` and `pictures` show it.
"""
