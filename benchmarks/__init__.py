"""Ours against the peers, measured in one run: `python -m benchmarks` (or `make bench`).

Every contestant of a case runs in a process of its own, and all of them take turns (A B C A B C ...), so that whatever
the machine does slows all alike. While one works the others wait; a round in which anything else used the processors is
thrown away and measured again, since a busy machine does not slow all frameworks by the same factor.

A new row is one small file in `cases/`, named in `cases/__init__.py`.
"""
