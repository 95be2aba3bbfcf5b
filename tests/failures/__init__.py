"""Faults in real processes and servers, and what is left afterwards: `make test-failures`.

Each case makes one fault while a stage runs, checks how the run ends, gives the same command again, and
compares the result with that of an undisturbed run. The cases write the table in docs/operations.md.
"""
