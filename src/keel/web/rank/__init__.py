"""The web pages of `keel rank`, in which people rank responses."""
