"""`faultsweep recommend`: which settings a guest should get.

The question (asked.py) becomes a study like any other: all settings under the conditions that were given, and under others that differ in
one. ranking.py compares their guest time under a memory budget, reason.py says where the difference comes from, changes.py what would
change the choice; answer.py does all in turn and tells it.
"""
