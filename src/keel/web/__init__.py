"""The web pages: `keel rank`, in which people rank responses, and `keel serve`, the dashboard of runs."""
