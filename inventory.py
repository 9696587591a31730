"""The hosts, and which group each is in. Settings of a group: group_data/GROUP.py.

gateways   nginx, the public port
workers    the inference service, one process per port, one GPU each where the host has them
trainers   where the model is trained
"""

import os
import sys

import lab
from provision.preflight import check_inventory

# ---- the lab: disposable hosts on this machine (`python -m lab up`) ------------------------------
try:
    _hosts = lab.inventory(os.environ.get("GATEWAY_LAB", "lab"))
except lab.LabError as error:
    sys.exit(str(error))


def _lab_hosts(prefix: str) -> list[tuple[str, dict[str, object]]]:
    return [
        (name, {key: value for key, value in host.items() if key != "name"})
        for name, host in _hosts.items()
        if name.startswith(prefix)
    ]


gateways = _lab_hosts("gw")
workers = _lab_hosts("gpu")
trainers = _lab_hosts("train")

# ---- your own hosts: replace everything between the lines by this --------------------------------
# `address` is the IP address by which the other hosts reach a host. Anything from
# docs/settings.md may stand beside it; so may `ssh_user`, `ssh_key`, `ssh_port`, `_sudo`.
#
# gateways = [
#     ("gw1.example.com", {"address": "10.0.0.11"}),
# ]
# workers = [
#     ("gpu1.example.com", {"address": "10.0.0.21"}),
#     ("gpu2.example.com", {"address": "10.0.0.22", "worker_ports": [9005, 9006, 9007, 9008]}),
# ]
# trainers = []
# --------------------------------------------------------------------------------------------------

# Every setting of every host is checked here, before the first connection.
check_inventory(__file__)
