"""glmae-ray pre-trains 3-D vision transformers on archives of CT and MR scans (GL-MAE on Ray)."""

__version__ = "0.1.0"
