"""The reward model behind HTTP, and the limits and checks that all HTTP servers of keel share."""
