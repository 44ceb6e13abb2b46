"""One verb of the command line per module, each with one run(cfg)."""
