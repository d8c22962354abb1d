"""Which channels belong together: shapes recorded on one run, an atom for every place of every dimension, and a rule
for each operator that says which atoms are the same.
"""
