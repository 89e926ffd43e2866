"""The command line `sd3kit`: `cli` holds the parser, and each command has a file.

May import everything else. Start with `cli.py`.
"""
