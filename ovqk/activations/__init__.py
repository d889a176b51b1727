"""The model run on a task's prompts: which heads do there what their weights say (docs/definitions.md, section 7)."""
