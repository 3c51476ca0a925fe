"""Files to ship: bundles, compressed archives of folders, and sparse storage of pruned tensors."""
