"""The stopper: a loss on held inputs, its trace, and the rules that read it.

`rules`, `compositions`, `judging`, `verdict`, `trace`, `logs` and `formats` need numpy alone; `probe` needs torch.
"""
