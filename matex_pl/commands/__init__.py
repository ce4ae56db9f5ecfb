"""The commands of `matex` that answer at once."""
