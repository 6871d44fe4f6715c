"""Looks at a setup, a bag or a running robot for what costs people days."""
