"""Devices, process groups and how a process joins its job."""
