"""A run: its settings, its folder, training in it, and loading it to act."""
