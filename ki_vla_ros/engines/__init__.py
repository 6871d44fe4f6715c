"""What runs the two graphs of a bundle: one contract (base.py), one file per library."""
