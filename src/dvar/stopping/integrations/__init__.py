"""The stopper in other training loops, one module for each framework."""
