"""The command line `sd3kit`. `cli` holds the parser; each command has a file. Start with `cli.py`."""
