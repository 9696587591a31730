"""Every way to start the training, on real hosts, and what a failure costs each."""
