"""Back to what ran before the last change: `pyinfra inventory.py rollback.py`.

Workers go back to their previous model, package and options, gateways to their previous
configuration; nothing is uploaded. `--data rollback=workers` or `--data rollback=gateways` takes
one side alone. A second rollback goes forward again; so does the next deploy, unless what is
declared was put right first.
"""

from pyinfra import host, inventory

from provision import gateway, preflight, workers
from provision.operations import barrier, report
from provision.verify import verify_live_gateway

fleet = preflight.current_fleet(inventory, with_files=False)
sides = preflight.rollback_sides(host)
as_gateway = fleet.gateways.get(host.name)
as_worker = fleet.workers.get(host.name)

if as_worker and "workers" in sides:
    workers.previous(as_worker, fleet)

barrier(name="Workers are ready")

if as_gateway and "gateways" in sides:
    gateway.previous()

barrier(name="Gateways are back")

if as_gateway:
    verify_live_gateway()

report(name="What this run came to")
