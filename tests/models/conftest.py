"""The model tests share tests/models/tiny.py and the references; both are imported from the repository's root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
