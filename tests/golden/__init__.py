"""Losses on record, and the script that records them."""
