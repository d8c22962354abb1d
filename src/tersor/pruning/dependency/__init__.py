"""Channel coupling: which channels of which layers have to be removed together (DepGraph, Fang et al., CVPR 2023).

`shape_recording` runs the network once, `propagation` and the `*_rules` couple channel ids operator by operator,
`groups` collects coupled channels, `search` and `removal_check` verify that they can be removed.
"""
