"""W&B runs and the dashboard, made from records: panels of a cell and of a sweep. `service` alone imports wandb."""
