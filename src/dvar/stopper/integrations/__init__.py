"""One file for each host: where in it a `Watch` is asked, and how it is told to stop.

Each needs the extra of its name, `pip install 'dvar[lightning]'`; a plain loop needs none of them.
"""
