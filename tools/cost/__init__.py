"""Planning a job without its GPUs: what a model costs, from its configuration alone."""
