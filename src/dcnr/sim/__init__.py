"""The same machines in virtual time: a simulated world, faults from a seed, and checkers that watch its borders."""

from dcnr.sim.run import Outcome, Patch, run, run_seed

__all__ = ["Outcome", "Patch", "run", "run_seed"]
