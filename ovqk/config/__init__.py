"""The keys that a user sets: their types, the checks of their values, and messages about wrong ones."""
