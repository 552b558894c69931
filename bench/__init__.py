"""Speed measurements: the training step (bench.step), its ops (bench.roofline), the kernels (bench/kernels)."""
