"""What runs where, in which order: `pyinfra inventory.py deploy.py`.

Workers first, so that a gateway never points at one that isn't ready; then gateways; then the
proof that clients are served; at last what is no longer declared goes away.
"""

from pyinfra import host, inventory

from provision import foresight, preflight
from provision.gateway import gateway, install
from provision.operations import barrier, report
from provision.verify import verify_gateway, verify_workers
from provision.workers import plan, retire, worker

fleet = preflight.current_fleet(inventory)
as_gateway = fleet.gateways.get(host.name)
as_worker = fleet.workers.get(host.name)
planned = plan(as_worker, fleet) if as_worker else None

foresight.look(name="What the hosts are like")

if as_gateway and as_worker and as_worker.unix_sockets:
    install(as_gateway)  # for its user, who may open the workers' sockets

if as_worker and planned:
    worker(as_worker, fleet, planned)

barrier(name="Workers are ready")

if as_gateway:
    gateway(as_gateway, fleet)

barrier(name="Gateways are configured")

if as_worker and planned:
    verify_workers(as_worker, fleet, planned)

if as_gateway:
    verify_gateway(as_gateway, fleet)

barrier(name="Clients are served")

if as_worker and planned:
    retire(as_worker, fleet, planned)

report(name="What this run came to")
