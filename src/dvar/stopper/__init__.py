"""The stopper: a loss on held inputs, its trace, and the rules that read it.

All rooms need numpy alone, but for `probe`, which needs torch, and `integrations`, each of which needs its host.
"""
