"""Installations: servers and workers of one machine, containers, systemd units, work pools, automations.

Imports nothing else of the project, which would take seconds, and nothing else imports it.
"""
