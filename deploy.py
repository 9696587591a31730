"""What runs where, in which order: `pyinfra inventory.py deploy.py`.

Workers first, so that a gateway never points at one that isn't ready; then gateways; then the
proof that clients are served; at last what is no longer declared goes away.
"""

from pyinfra import host, inventory

from provision import preflight
from provision.gateway import gateway
from provision.verify import verify_gateway, verify_workers
from provision.workers import plan, retire, worker

fleet = preflight.current_fleet(inventory)
planned = plan(fleet.workers[host.name]) if host.name in fleet.workers else None

if planned:
    worker(fleet.workers[host.name], fleet, planned)

if host.name in fleet.gateways:
    gateway(fleet.gateways[host.name], fleet)

if planned:
    verify_workers(fleet.workers[host.name], planned)

if host.name in fleet.gateways:
    verify_gateway(fleet.gateways[host.name])

if planned:
    retire(fleet.workers[host.name], planned)
