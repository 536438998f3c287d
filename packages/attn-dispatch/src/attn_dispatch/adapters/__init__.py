"""Hosts: how an attention is caught and handed to a handler."""
