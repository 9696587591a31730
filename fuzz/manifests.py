"""Manifests of bundles, fuzzed: `python -m fuzz.manifests`."""

from fuzz import run

if __name__ == "__main__":
    run.main("manifests")
