"""Settings of the gateways: nginx. What is left out has the default of docs/settings.md."""

# Public port. Clients connect to ws://GATEWAY:8009.
listen_port = 8009

# "reference": nginx's worker processes are root, SELinux is permissive, no TLS. "hardened": user
# nginx, SELinux enforcing, TLS only, limits, a sandbox; it needs a certificate (docs/runbook.md).
# Every single thing can also be set alone.
profile = "reference"

# Idle upstream connections kept per nginx worker process.
upstream_keepalive = 1000

# Seconds that a socket may be silent before nginx closes it.
proxy_read_timeout_s = 3600
