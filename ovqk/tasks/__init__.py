"""Tasks: prompts, words, claims, and the metrics that need a task's words."""
