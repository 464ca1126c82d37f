"""The store of rankings: items, raters, what each was shown and answered, and the exports."""
