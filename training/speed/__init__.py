"""How fast the runtime is compared with others, and how much memory training takes."""
