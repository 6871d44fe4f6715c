"""Looks for the faults that cost people days, in a setup, a bag or a running robot."""
