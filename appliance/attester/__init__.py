"""Evidence from this machine, collected by a process of its own (`dcv attester`)."""
