"""Stand-ins for a whole process whose ``PYTHONPATH`` names this folder."""

import sys

from absent import Finder

sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
