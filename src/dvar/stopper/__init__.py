"""The stopper: a loss on held inputs, its trace, and the rules that read it.

`rules`, `compositions`, `judging`, `verdict` and `trace` need numpy alone; `probe` needs torch.
"""
