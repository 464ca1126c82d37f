"""Scored answers become updated weights."""
