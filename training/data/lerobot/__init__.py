"""LeRobot datasets, format v3.0: made from bags, turned back into bags, and read for training (docs/data.md)."""
