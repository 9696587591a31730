"""Settings of the trainers. Defaults and the rest: docs/settings.md."""
