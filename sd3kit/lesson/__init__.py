"""What every lesson draws and checks with: picture grids, self-checks, and where words look.

Imports nothing of sd3kit. Start with `check.py`.
"""
