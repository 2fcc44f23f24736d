"""The commands of `python -m evaluation`, a file each: `TEXT`, `EXAMPLES`, `add(parser)` and `do(args)`.

What is heavy is imported when a command is done, so that `--help` is quick.
"""
