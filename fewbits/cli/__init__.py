"""The command line: one file a command, each of which parses, calls and prints.

Standard output carries the result (with `--json` nothing else); progress and messages go to standard error.
Exit codes: 0 done, 2 bad input, 1 failed.
"""
