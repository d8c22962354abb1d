"""`tersor compress`: search for the fastest network within a budget.

`compress.py` runs the phases: feasible range, survey of the candidates, successive halving, the front.
"""
