"""Runs side by side: what differs, which is better and by how much, how they got there.

`comparison.compare` reads runs into plain data; `table`, `page` and `pictures` show it.
"""

import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it warns where the home folder cannot be written
