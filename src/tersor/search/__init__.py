"""`tersor compress`: a budget in, the fastest network out.

`compress.py` runs the phases: feasible range, survey of the candidates, successive halving, the front.
"""
