"""A run: built from a configuration, rebuilt from its folder, tested again, exported, imported."""
