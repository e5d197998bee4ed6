"""The same machines in virtual time: a simulated world, faults from a seed, and checkers that watch its borders."""

from dcnr.sim.faults import Only
from dcnr.sim.run import Outcome, Patch, run, run_seed
from dcnr.sim.shrink import Shrunk, shrink

__all__ = ["Only", "Outcome", "Patch", "Shrunk", "run", "run_seed", "shrink"]
