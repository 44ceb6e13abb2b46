"""The networks: a 3-D vision transformer and the GL-MAE pre-training objective."""
