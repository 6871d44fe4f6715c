"""The demo's data: episodes of the simulated arm, and questions about its scenes."""
