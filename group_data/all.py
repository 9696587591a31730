"""Settings of every host. All settings, with defaults and units: docs/settings.md."""

# How to connect; anything that pyinfra's SSH connector understands.
ssh_user = "root"
