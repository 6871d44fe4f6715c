"""How fast the runtime is beside others, and how much memory training takes."""
