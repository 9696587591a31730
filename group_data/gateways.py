"""Settings of the gateways: nginx. What is left out has the default of docs/settings.md."""

# Public port. Clients connect to ws://GATEWAY:8009.
listen_port = 8009

# User of nginx's worker processes. "nginx" is the safer choice; both work.
nginx_user = "root"

# SELinux of the running system and of the next boot. "enforcing" goes together with
# `selinux_allow_connect = True`: without it nginx is denied the workers (13: Permission denied).
selinux_mode = "permissive"

# Idle upstream connections kept per nginx worker process.
upstream_keepalive = 1000

# Seconds that a socket may be silent before nginx closes it.
proxy_read_timeout_s = 3600
