"""What ``import bench`` finds in a script that runs by its path, ``python bench/sweep.py``.

Python then looks in the script's own folder, not in the repository's root. This module puts the
root in that place, as ``python -m bench.sweep`` would, and leaves the name to the package.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
del sys.modules[__name__]  # the next line imports the package in its stead
import bench  # noqa: E402, F401
