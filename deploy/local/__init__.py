"""Servers and workers on this machine: `python -m deploy.local up`, `down` and `status`."""
