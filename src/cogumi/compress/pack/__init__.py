"""What is shipped: bundles, packed folders, pruned tensors without their zeros."""
