"""One thread and the settings of a PNode, before any test makes a tensor."""

from dcnr.adapters.torch.environment import prepare

prepare(1)
