"""What tests share: made-up robots, bags and bundles, and the other side of what is tested."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
# How many times as many random cases, of motion and of kills: 5 for all that docs/faults.md counts, more to search.
MORE_CASES = int(os.environ.get("KI_VLA_CASES", "1"))
