"""What tests share: made-up robots, bags and bundles, and the other side of what is tested."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
