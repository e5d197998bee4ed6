"""Real processes, each with a root folder of its own; one torch thread here as in every PNode."""

from dcnr.adapters.torch.environment import prepare

prepare(1)
