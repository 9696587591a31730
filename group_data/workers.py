"""Settings of the workers: the inference service. Defaults and the rest: docs/settings.md."""

# One worker process per port; on hosts with NVIDIA GPUs, one GPU each.
worker_ports = [9005, 9006]

# What they serve: a version's folder, or the model's folder for its newest version.
model = "models/digits"

# "wheelhouse": wheels from this machine, so that hosts need no internet. "index": pip downloads.
packages_from = "wheelhouse"
