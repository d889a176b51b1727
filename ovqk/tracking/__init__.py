"""W&B runs and the dashboard, made from records: panels for cells and for sweeps. Only `service` imports wandb."""
