"""The client library: create networks, add data, train, follow, generate. It talks to an orchestrator and to nothing else."""
