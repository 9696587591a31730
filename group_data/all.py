"""Settings of every host. All settings, with defaults and units: docs/settings.md.

How to connect is said here too, in the words of pyinfra's SSH connector: `ssh_user`, `ssh_key`,
`ssh_port`, or `_sudo = True` for a user that is not root.
"""

# Several models behind the same gateways, each by a path or host name (docs/runbook.md):
# services = {
#     "digits": {"model": "models/digits", "path": "/digits"},
#     "words": {"model": "models/words", "path": "/words", "worker_ports": [9105, 9106]},
# }
