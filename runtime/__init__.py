"""How any script runs: command line, run folder, device, one step after another."""
