"""Requests to servers of others: looked-up addresses, and the client of OpenAI-compatible endpoints."""
