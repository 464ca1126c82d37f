"""The store of rankings: the items, the raters, the order in which responses were shown, the rankings, and exports."""
