"""What `faultsweep calibrate -o FILE` measures on this machine: probes, their runs, and the cost file made of them."""
